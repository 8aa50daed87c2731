"""The ways of attention by measurement: of the shapes that a model has, alike on all ranks, and kept by a run."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.vlm.model.tiny import tiny_model
from vlm.attention_choice import AttentionShape, MeasuredAttention
from vlm.distributed.world import World
from vlm.model import attention_measurement
from vlm.model.attention import Block
from vlm.model.attention_measurement import measure_attention


def shape(*, is_causal: bool, heads: int = 2, head_dim: int = 8) -> AttentionShape:
    return AttentionShape(device="cpu", dtype="float32", heads=heads, head_dim=head_dim, is_causal=is_causal)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))


def times_of(explicit: dict[int, float], fused: float = 1.0) -> Callable[..., dict[str, float]]:
    return lambda _, length: {"fused": fused, "explicit": explicit[length]}


@pytest.mark.parametrize(
    ("explicit", "ways"),
    [
        ({16: 0.5, 32: 0.6, 64: 0.97, 128: 1.6}, ((32, "explicit"), (128, "fused"))),  # by less than 5 %: noise
        ({16: 2.0}, ((16, "fused"),)),  # hopeless: longer rows are not tried
        ({16: 1.2, 32: 0.5, 64: 1.6}, ((16, "fused"), (32, "explicit"), (64, "fused"))),
    ],
)
def test_the_faster_way_is_taken_for_each_length(
    explicit: dict[int, float], ways: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_measurement, "_times", times_of(explicit))
    assert attention_measurement._fastest(shape(is_causal=True)).ways == ways


def test_queries_and_keys_count_as_a_square_of_as_many_pairs() -> None:
    measured = MeasuredAttention(shape=shape(is_causal=False), ways=((4, "explicit"), (8, "fused"), (16, "flash")))
    ways = [measured.way(queries, keys) for queries, keys in ((4, 4), (2, 8), (1, 17), (8, 8), (3, 50), (20, 20))]
    assert ways == ["explicit", "explicit", "fused", "fused", "flash", "fused"]


def test_both_ways_are_timed_here() -> None:
    times = attention_measurement._times(shape(is_causal=True), 16)
    assert set(times) == {"fused", "explicit"}
    assert all(0 < seconds < 10 for seconds in times.values())


def test_each_block_goes_by_the_measurement_of_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_measurement, "_times", times_of({16: 0.5, 32: 2.0}))
    model = tiny_model()
    measured = measure_attention(model, torch.float32, World())
    causal = {name.partition(".")[0]: set[bool]() for name, block in model.named_modules() if isinstance(block, Block)}
    for name, block in model.named_modules():
        if isinstance(block, Block):
            assert block.attn.measured in measured
            found = block.attn.measured.shape
            causal[name.partition(".")[0]].add(found.is_causal)
            assert found.heads * found.head_dim == block.attn.out_proj.in_features
            assert found.heads == block.attn.heads
    assert causal == {"image": {False}, "text": {True}}


def test_what_a_checkpoint_knows_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_measurement, "_times", times_of({16: 0.5, 32: 2.0}))
    first = measure_attention(tiny_model(), torch.float32, World())
    monkeypatch.setenv("VLM_CACHE", "/nowhere/at/all")
    monkeypatch.setattr(attention_measurement, "_times", times_of({16: 2.0}))
    assert measure_attention(tiny_model(), torch.float32, World(), first) == first
    assert measure_attention(tiny_model(), torch.bfloat16, World(), first) != first  # of another precision
    assert measure_attention(tiny_model(), torch.float32, World()) != first


def _measure_on_a_rank(cache: str) -> list[Any]:
    world = World.current(torch.device("cpu"))
    os.environ["VLM_CACHE"] = f"{cache}/{world.rank}"  # two machines
    attention_measurement._times = times_of({16: 0.5 if world.rank else 2.0, 32: 2.0})  # type: ignore[assignment]
    return [one.ways for one in measure_attention(tiny_model(), torch.float32, world)]


def test_all_ranks_go_by_what_the_first_measured(tmp_path: Path) -> None:
    assert run_ranks(_measure_on_a_rank, 2, str(tmp_path)) == [[((16, "fused"),)] * 2] * 2
