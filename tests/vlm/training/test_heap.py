"""A run on a CPU gives unused memory back to the system."""

from typing import Any

import psutil
import pytest
import torch

from tests.vlm.objectives.batches import batch_of
from vlm.training.accumulation import LossOutput
from vlm.training.hooks.base import StepEvent
from vlm.training.hooks.heap import EVERY, HeapTrim, malloc_trim
from vlm.training.step import StepResult


def event(step: int) -> StepEvent:
    return StepEvent(step, False, 0.0, batch_of(1), StepResult(LossOutput(torch.zeros(()), {}, {}), 1.0))


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.skipif(malloc_trim() is None, reason="the C library has no malloc_trim")
def test_holes_between_tensors_that_stay_are_given_back() -> None:
    """Every hundred steps, and at no other."""
    hook, few = HeapTrim(), 8
    tensors: list[Any] = [torch.ones(20_000) for _ in range(4_000)]  # 80 kB each: on the heap, in whatever state it is
    kept = tensors[::few]
    del tensors
    before = resident()
    hook.after_step(event(EVERY - 1))
    assert resident() > before - 20e6
    hook.after_step(event(EVERY))
    assert resident() < before - 150e6
    assert all(bool(tensor.eq(1).all()) for tensor in kept)
