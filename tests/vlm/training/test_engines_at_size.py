"""Each option of an engine keeps the gradient of one process, and its state moves to and from any other engine."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.training.test_engines import MANIFEST, state_of
from tests.vlm.training.toy import GLOBAL_BATCH, Setup, start, toy_batch, train_state
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.writer import write_checkpoint
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.training.accumulation import accumulate
from vlm.training.ema import Ema, EmaConfig
from vlm.training.engines.base import Engine, EngineSettings
from vlm.training.engines.groups import shard_mesh
from vlm.training.engines.options import EngineOptions
from vlm.training.engines.registry import EngineName
from vlm.training.engines.start import configuration
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.state import restore_state, state_groups
from vlm.training.step import train_step

SAVED, LAST, MICRO_BATCH = 3, 5, 2


def steps(engine: Engine, ema: Ema, first: int, last: int) -> list[tuple[float, float]]:
    """The losses over the global batch of steps `first` to `last`, in micro-batches, and the gradients' norms."""
    world, figures = engine.world, []
    plan, state = MicroBatchPlan(GLOBAL_BATCH, world.size, MICRO_BATCH), train_state(engine, ema)
    for step in range(first, last):
        batch = toy_batch(step, world.rank, world.size)
        if step == first:
            engine.warm_up(batch)
        result = train_step(state, batch, plan, seed=0, lr=1e-3)
        loss = world.sum(result.loss_output.loss.double()) / world.size
        figures.append((float(loss), result.grad_norm))
    return figures


def gradients_of(engine: Engine) -> dict[str, Tensor]:
    world = engine.world
    batch = toy_batch(0, world.rank, world.size)
    engine.warm_up(batch)
    plan = MicroBatchPlan(GLOBAL_BATCH, world.size, MICRO_BATCH)
    accumulate(engine, train_state(engine).objective, batch, plan, seed=0)
    return {name: engine.gradient(name).cpu() for name in engine.parameters()}


def life(setup: Setup, world_size: int, folder: Path, others: Path | None) -> dict[str, Any]:
    """Gradients, some steps with a checkpoint between, a new engine that goes on from it, and one from `others`'."""
    if setup.options.shard_group == "node":
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    first = start(setup, world_size)
    gradients = gradients_of(first)
    anew = partial(start, setup, world_size, accelerator=first.accelerator)
    engine = anew()
    ema = Ema(EmaConfig(decay=0.9), engine)
    before = steps(engine, ema, 0, SAVED)
    manifest = MANIFEST.model_copy(update={"step": SAVED, "num_updates": engine.num_updates()})
    with torch.no_grad():
        write_checkpoint(folder, manifest, state_groups(engine, ema), engine.world)
    state = state_of(engine, ema)
    told = {"gradients": gradients, "figures": before + steps(engine, ema, SAVED, LAST), "state": state}
    for name, source in (("again", folder), ("moved", others)):
        if source is not None:
            engine = anew()
            ema = Ema(EmaConfig(decay=0.9), engine)
            restore_state(Checkpoint(source / f"step-{SAVED:08d}"), engine, ema)
            told[f"{name} state"] = state_of(engine, ema)
            told[name] = steps(engine, ema, SAVED, LAST)
    told["used"] = used_by(engine)
    if setup.options.shard_group == "node":
        told["groups"] = groups_of(engine.world)
    return told


def used_by(engine: Engine) -> dict[str, Any]:
    """What the libraries themselves keep of the options that they were given."""
    wrapped: Any = engine.wrapped
    if hasattr(wrapped, "bucket_bytes_cap"):
        return {"bucket_cap_mb": wrapped.bucket_bytes_cap / 2**20, "view": wrapped.gradient_as_bucket_view}
    if engine.settings.name.startswith("zero"):
        kept = wrapped._config
        return {
            "train_micro_batch_size_per_gpu": kept.train_micro_batch_size_per_gpu,
            "gradient_accumulation_steps": kept.gradient_accumulation_steps,
            "gradient_clipping": kept.gradient_clipping,
            "communication_data_type": {torch.float32: "fp32", torch.bfloat16: "bf16"}[wrapped.communication_data_type],
            "zero_optimization": kept.zero_config.model_dump(mode="json", exclude_unset=True),
        }
    return {}


def groups_of(world: World) -> dict[str, Any]:
    """The groups of ranks that are made, and what is said where nodes differ."""
    told: dict[str, Any] = {"of the launcher": tuple(shard_mesh(world, "node").shape)}
    os.environ.pop("LOCAL_WORLD_SIZE")
    told["by machine"] = tuple(shard_mesh(world, "node").shape)
    os.environ["LOCAL_WORLD_SIZE"] = "1" if world.is_main else "3"
    for group in ("node", 3):
        with pytest.raises(EveryRankError) as caught:
            shard_mesh(world, group)
        told[str(group)] = str(caught.value)
    return told


def relative(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


def assert_near(found: list[tuple[float, float]], expected: list[tuple[float, float]], tolerance: float) -> None:
    assert [value for pair in found for value in pair] == pytest.approx(
        [value for pair in expected for value in pair], rel=tolerance
    )


def assert_same_state(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[group][name], tensor), (group, name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The same life in one process with whole weights on the whole batch, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("alone")
    return life(Setup("ddp"), 1, folder, None), folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world_size", "options"),
    [
        ("fsdp", 4, {"shard_group": "node", "offload": {"parameters": "cpu"}}),
        ("zero2", 3, {"offload": {"optimizer": "cpu"}, "overlap": False, "bucket_mib": 1}),
        ("zero3", 2, {"offload": {"optimizer": "cpu", "parameters": "cpu"}}),
        ("ddp", 3, {"wire": "bf16", "bucket_mib": 1}),
        ("fsdp", 2, {"wire": "bf16"}),
        ("zero1", 2, {"wire": "bf16"}),
    ],
)
def test_an_option_keeps_the_gradient_and_the_state(
    alone: tuple[dict[str, Any], Path], tmp_path: Path, engine: EngineName, world_size: int, options: dict[str, Any]
) -> None:
    expected, checkpoint = alone
    setup = Setup(engine, options=EngineOptions.model_validate(options))
    found = run_ranks(life, world_size, setup, world_size, tmp_path, checkpoint, group=False)[0]
    exact = "wire" not in options
    for name, gradient in expected["gradients"].items():
        difference = relative(found["gradients"][name], gradient)
        assert difference <= (1e-5 if exact else 2**-7), name
        if not exact and gradient.numel() > 1:
            assert difference > 1e-5, name  # it really travels in bf16
    assert_near(found["figures"], expected["figures"], 1e-5 if exact else 1e-2)
    shown = configuration(
        EngineSettings(engine, GLOBAL_BATCH // world_size, max_grad_norm=setup.max_grad_norm, options=setup.options),
        cuda=False,
    )
    for name, value in found["used"].items():
        if engine == "ddp":
            assert value == {**shown["distributed_data_parallel"], "view": True}[name]
        else:
            assert value == shown["deepspeed"][name], name
    assert_same_state(found["again state"], found["state"])
    assert found["again"] == found["figures"][SAVED:]
    assert_same_state(found["moved state"], expected["state"])
    assert_near(found["moved"], expected["figures"][SAVED:], 1e-5 if exact else 1e-2)
    if engine == "fsdp" and world_size == 4:
        assert found["groups"] == {
            "of the launcher": (2, 2),
            "by machine": (4,),
            "node": "engine_options.shard_group: nodes have 1 to 3 ranks; say a number, or all",
            "3": "engine_options.shard_group: found 3, which does not divide the run's 4 ranks; choose from: all, 2",
        }
    back = start(Setup("ddp"), 1)
    ema = Ema(EmaConfig(decay=0.9), back)
    restore_state(Checkpoint(tmp_path / f"step-{SAVED:08d}"), back, ema)
    assert_same_state(state_of(back, ema), found["state"])
