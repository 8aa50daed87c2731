"""A trace without memory has the bytes that torch's allocator counts, and the FLOPs that torch's counter counts."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from launch.plan.trace import trace_step
from launch.plan.work import Work
from vlm.batch import BatchPart, Images, Texts
from vlm.model.activations import checkpoint_activations
from vlm.model.build import build_model, build_shapes
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.outputs import PAIR

ROWS, LENGTH = 8, 16
MODEL = ModelConfig.model_validate(
    {
        "architecture": {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 3},
            "text_cfg": {
                "context_length": LENGTH,
                "vocab_size": 502,
                "hf_tokenizer_name": "vlm:scenes",
                "width": 64,
                "heads": 2,
                "layers": 3,
            },
        }
    }
)


def step(model: DualEncoder) -> None:
    parts: dict[str, BatchPart] = {
        "image": Images(torch.zeros(ROWS, 3, 32, 32, dtype=torch.uint8)),
        "text": Texts(torch.ones(ROWS, LENGTH, dtype=torch.int64), torch.full((ROWS,), LENGTH)),
    }
    made = model(parts, PAIR)
    tops = [made["image"], made["text"]]
    del made
    torch.autograd.backward(tops, [torch.ones_like(top) for top in tops])


def allocated(model: DualEncoder) -> int:
    """The most bytes at a time that torch's CPU allocator gave away during a step, beside what was there before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model)
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("recomputed", [(), ("image", "text")])
def test_what_is_alive_is_what_the_allocator_counts(recomputed: tuple[str, ...]) -> None:
    model, shapes = build_shapes(MODEL)
    checkpoint_activations(model, recomputed)
    backward = trace_step(model, shapes, PAIR, ROWS, LENGTH, "fp32").backward
    predicted = max(own + other for own, other in zip(backward.gradients, backward.others, strict=True))
    real = build_model(MODEL)
    checkpoint_activations(real, recomputed)
    assert predicted == pytest.approx(allocated(real), rel=0.03)  # kernels have a little scratch memory of their own


def test_flops_are_those_of_torchs_counter_and_rows_scale_them() -> None:
    model, shapes = build_shapes(MODEL)
    traces = [trace_step(model, shapes, PAIR, rows, LENGTH, "fp32") for rows in (2, 4)]
    work = Work(*traces)
    counted = sum(work.costs(phase, ROWS).total_flops for phase in ("forward", "backward"))
    real = build_model(MODEL)
    with FlopCounterMode(display=False) as counter:
        step(real)
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-9)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert work.held("backward", ROWS).gradients[-1] == 4 * (weights - 1)  # the scale gets its own by the loss
