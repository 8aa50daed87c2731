"""Every engine at every world size takes the same steps, and its state moves to any other."""

import math
import time
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.training.toy import WHOLE, Setup, start, toy_batch, train_state
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.manifest import Manifest
from vlm.checkpoint.writer import write_checkpoint
from vlm.errors import UserError
from vlm.model.logit_scale import MAX_LOGIT_SCALE
from vlm.objectives.objective import Objective
from vlm.objectives.step import PairStep
from vlm.objectives.term import PairTerm
from vlm.outputs import PAIR
from vlm.similarity.exchange import Exchange
from vlm.training.accumulation import accumulate
from vlm.training.ema import Ema, EmaConfig
from vlm.training.engines.base import Engine
from vlm.training.engines.registry import EngineName
from vlm.training.state import restore_state, state_groups
from vlm.training.step import train_step

NUM_STEPS = 20
WAYS: list[tuple[EngineName, int]] = [
    ("ddp", 1),
    ("ddp", 2),
    ("ddp", 3),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3", 3),
    ("fsdp", 2),
    ("fsdp", 3),
]
MANIFEST = Manifest(
    step=0, samples=0, num_updates=0, world_size=1, engine="ddp", threads=1, model={}, data={}, versions={}
)


def run_steps(engine: Engine, first: int, last: int, ema: Ema | None, lr: float = 1e-3) -> list[float]:
    """The losses over the global batch of steps `first` to `last`."""
    losses = []
    world = engine.world
    state = train_state(engine, ema)
    for step in range(first, last):
        batch = toy_batch(step, world.rank, world.size)
        if step == first:
            engine.warm_up(batch)
        result = train_step(state, batch, WHOLE, seed=0, lr=lr)
        losses.append(float(world.sum(result.loss_output.loss.double()) / world.size))
    return losses


def state_of(engine: Engine, ema: Ema) -> dict[str, dict[str, Tensor]]:
    """All of it, gathered whole: what a checkpoint, written in parts, has to hold."""
    with torch.no_grad():
        state = {"weights": {name: engine.weight(name).clone() for name in engine.shapes}}
        for kind in ("exp_avg", "exp_avg_sq"):
            moments = {name: engine.moment(name, kind) for name in engine.parameters()}
            state[kind] = {name: moment.clone() for name, moment in moments.items() if moment is not None}
        return state | {"ema": {name: ema.full(name).clone() for name in engine.parameters()}}


def story(setup: Setup, world_size: int, folder: str) -> dict[str, Any]:
    """Gradients at step 0, the losses of 20 steps, and a checkpoint in the middle with the state it was made from."""
    engine = start(setup, world_size)
    ema = Ema(EmaConfig(decay=0.9), engine)
    batch = toy_batch(0, engine.world.rank, world_size)
    engine.warm_up(batch)
    accumulate(engine, train_state(engine).objective, batch, WHOLE, seed=0)
    gradients = {name: engine.gradient(name) for name in engine.parameters()}
    engine.step(0.0)
    dirty = engine.num_updates()
    kept = engine.moments.items()
    engine.load_moments({name: {kind: torch.zeros(one.shape) for kind, one in ones.items()} for name, ones in kept}, 0)
    losses = run_steps(engine, 0, NUM_STEPS // 2, ema)
    manifest = MANIFEST.model_copy(update={"step": NUM_STEPS // 2, "num_updates": engine.num_updates()})
    with torch.no_grad():
        write_checkpoint(Path(folder), manifest, state_groups(engine, ema), engine.world)
    state = state_of(engine, ema)
    losses += run_steps(engine, NUM_STEPS // 2, NUM_STEPS, ema)
    engine.accelerator.end_training()
    return {"gradients": gradients, "losses": losses, "state": state, "updates": (dirty, NUM_STEPS // 2)}


def continued(setup: Setup, world_size: int, checkpoint: str) -> dict[str, Any]:
    """The state right after a restore, and the losses from there on."""
    engine = start(setup, world_size)
    ema = Ema(EmaConfig(decay=0.9), engine)
    restore_state(Checkpoint(Path(checkpoint)), engine, ema)
    state = state_of(engine, ema)
    updates = engine.num_updates()
    losses = run_steps(engine, NUM_STEPS // 2, NUM_STEPS, ema)
    engine.accelerator.end_training()
    return {"state": state, "losses": losses, "updates": updates}


@pytest.fixture(scope="module")
def tell(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The story of one engine at one world size, told once."""

    @cache
    def once(engine: EngineName, world_size: int) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp(f"{engine}-{world_size}")
        results = run_ranks(story, world_size, Setup(engine), world_size, str(folder), group=False)
        return results[0], folder / f"step-{NUM_STEPS // 2:08d}"

    return once


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world_size"), WAYS[1:])
def test_gradients_and_losses_are_those_of_one_process(tell: Any, engine: EngineName, world_size: int) -> None:
    alone, _ = tell("ddp", 1)
    told, _ = tell(engine, world_size)
    for name, expected in alone["gradients"].items():
        assert torch.linalg.norm(told["gradients"][name] - expected) <= 1e-5 * torch.linalg.norm(expected), name
    assert told["losses"] == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("zero2", 2), ("ddp", 1)),
        (("zero2", 2), ("zero3", 3)),
        (("ddp", 1), ("zero1", 2)),
        (("zero3", 2), ("ddp", 2)),
        (("ddp", 3), ("ddp", 3)),
        (("zero1", 2), ("zero1", 2)),
        (("fsdp", 3), ("zero3", 2)),
        (("zero2", 2), ("fsdp", 3)),
        (("fsdp", 2), ("fsdp", 2)),
    ],
)
def test_state_moves_between_engines_and_world_sizes(
    tell: Any, saved: tuple[EngineName, int], loaded: tuple[EngineName, int]
) -> None:
    told, checkpoint = tell(*saved)
    after = run_ranks(continued, loaded[1], Setup(loaded[0]), loaded[1], str(checkpoint), group=False)[0]
    assert after["updates"] == NUM_STEPS // 2
    for group, tensors in told["state"].items():
        for name, expected in tensors.items():
            assert torch.equal(after["state"][group][name], expected), (group, name)
    rest = told["losses"][NUM_STEPS // 2 :]
    if saved == loaded:
        assert after["losses"] == rest
    else:
        assert after["losses"][0] == pytest.approx(rest[0], rel=1e-5)
        assert after["losses"] == pytest.approx(rest, rel=1e-4)


class Pull(PairTerm):
    """The scale up or down; one rank's part has the opposite sign of the whole gradient: only the whole may decide."""

    sign: float

    def __call__(self, step: PairStep) -> Tensor:
        world = step.exchange.world
        factor = 1.0 if world.size == 1 else 3.0 if world.rank == 0 else -1.0
        return self.sign * factor * step.logit_scale.sum()


def scale_into_the_limit_and_back(setup: Setup, world_size: int) -> list[tuple[float, float]]:
    """(parameter, scale used) while the gradient pushes the scale up, then down."""
    engine = start(setup, world_size)
    seen = []
    for step in range(16):
        batch = toy_batch(0, engine.world.rank, world_size)
        if step == 0:
            engine.warm_up(batch)
        pull = Objective({"pull": Pull(sign=-1.0 if step < 8 else 1.0)}, exchange=Exchange(engine.world))
        outputs = accumulate(engine, pull, batch, WHOLE, seed=0).outputs
        engine.step(0.01)
        with torch.no_grad():
            seen.append((float(engine.weight("logit_scale")), float(outputs["logit_scale"])))
    engine.accelerator.end_training()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world_size"), [w for w in WAYS if w not in (("zero3", 3), ("fsdp", 3))])
def test_the_scale_stops_at_the_limit_and_comes_back(engine: EngineName, world_size: int) -> None:
    start_at = math.log(MAX_LOGIT_SCALE) - 0.025
    setup = replace(Setup(engine), log_scale=start_at, max_grad_norm=None, beta1=0.0)
    for seen in run_ranks(scale_into_the_limit_and_back, world_size, setup, world_size, group=False):
        parameters, scales = zip(*seen, strict=True)
        assert max(scales) <= MAX_LOGIT_SCALE * (1 + 1e-6)
        assert max(parameters) < math.log(MAX_LOGIT_SCALE) + 0.011  # one step of 0.01 beyond, no further
        assert max(scales) == pytest.approx(MAX_LOGIT_SCALE)
        pushed_up = list(pairwise(parameters[:8]))
        beyond = [after for before, after in pushed_up if before > math.log(MAX_LOGIT_SCALE)]
        assert beyond  # where it stands still as long as the whole gradient pushes it up
        assert beyond == [max(parameters)] * len(beyond)
        assert parameters[-1] < start_at  # and it came back


def average_story(
    setup: Setup, world_size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], bool]:
    """The average, the weights while it is lent to the model and afterwards, and whether lending copies."""
    engine = start(setup, world_size)
    ema = Ema(EmaConfig(decay=0.9, ramp=False), engine)
    run_steps(engine, 0, 3, ema)
    with torch.no_grad():
        average = {name: ema.full(name).clone() for name in ema.shards}
        with engine.swapped_weights(ema.shards):
            held = {name: engine.weight(name).clone() for name in ema.shards}
            copied = any(engine.shard(name).data_ptr() != shard.data_ptr() for name, shard in ema.shards.items())
        after = {name: engine.weight(name).clone() for name in ema.shards}
    engine.accelerator.end_training()
    return average, held, after, copied


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 1), ("zero2", 2), ("zero3", 2), ("fsdp", 2)])
def test_the_average_follows_its_recursion_and_is_lent_to_the_model(engine: EngineName, world_size: int) -> None:
    alone = run_ranks(weights_by_step, 1, Setup("ddp"), group=False)[0]
    average, held, after, copied = run_ranks(average_story, world_size, Setup(engine), world_size, group=False)[0]
    assert copied == (engine in ("zero3", "fsdp"))
    for name, found in average.items():
        expected = alone[0][name]
        for weights in alone[1:]:
            expected = 0.9 * expected + 0.1 * weights[name]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(held[name], found)
        torch.testing.assert_close(after[name], alone[-1][name], rtol=1e-4, atol=1e-5)


def weights_by_step(setup: Setup) -> list[dict[str, Tensor]]:
    engine = start(setup, 1)
    seen = [{name: engine.weight(name).clone() for name in engine.parameters()}]
    for step in range(3):
        run_steps(engine, step, step + 1, None)
        seen.append({name: engine.weight(name).clone() for name in engine.parameters()})
    engine.accelerator.end_training()
    return seen


def losses_under_bf16(setup: Setup, world_size: int) -> tuple[list[float], set[torch.dtype]]:
    engine = start(setup, world_size)
    dtypes = {engine.weight(name).dtype for name in engine.parameters()}
    outputs = engine.forward(toy_batch(0, engine.world.rank, world_size), PAIR)
    dtypes |= {outputs["image"].dtype, outputs["logit_scale"].dtype}
    losses = run_steps(engine, 0, 5, None)
    dtypes |= {moment.dtype for name in engine.parameters() if (moment := engine.moment(name, "exp_avg")) is not None}
    engine.accelerator.end_training()
    return losses, dtypes


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 2), ("zero1", 2), ("zero3", 2), ("fsdp", 2)])
def test_bf16_computes_lower_and_keeps_masters_and_loss_in_fp32(engine: EngineName, world_size: int) -> None:
    exact = run_ranks(losses_under_bf16, 1, Setup("ddp"), 1, group=False)[0][0]
    losses, dtypes = run_ranks(losses_under_bf16, world_size, Setup(engine, precision="bf16"), world_size, group=False)[
        0
    ]
    assert dtypes == {torch.float32}
    assert losses != pytest.approx(exact, rel=1e-5)  # autocast is really on
    assert losses == pytest.approx(exact, rel=3e-2)


def leave_an_average(setup: Setup, left: Path) -> bool:
    """Whether rank 1, which fails while both ranks look at an average, comes out of that while rank 0 is elsewhere."""
    engine = start(setup, 2)
    in_time = True
    run_steps(engine, 0, 1, None)  # ZeRO-3 keeps small weights gathered from here on
    with torch.no_grad():
        average = Ema(EmaConfig(decay=0.9), engine).shards
        try:
            with engine.swapped_weights(average):
                until = time.monotonic() + 20
                while engine.world.is_main and not left.exists() and time.monotonic() < until:
                    time.sleep(0.01)
                in_time = left.exists() or not engine.world.is_main
                raise UserError("my data is gone")
        except UserError:
            left.touch()
    return in_time


def test_a_rank_that_fails_amid_an_average_waits_for_nobody(tmp_path: Path) -> None:
    """It would bring its weights back together with the others, who wait for it elsewhere, and never say why."""
    assert run_ranks(leave_an_average, 2, Setup("zero3"), tmp_path / "left", group=False) == [True, True]
