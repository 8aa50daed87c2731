"""A step whose loss or gradient is no finite number changes nothing, under every engine; a few in a row end the run."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.training.poison import Poison
from tests.vlm.training.toy import GLOBAL_BATCH, TERMS, Setup, start, toy_batch
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.manifest import Manifest, SpikeRecord
from vlm.checkpoint.parts import Part
from vlm.checkpoint.writer import write_checkpoint
from vlm.errors import EveryRankError
from vlm.objectives.objective import Objective
from vlm.objectives.providers.queue import Queue
from vlm.objectives.state import RunFacts
from vlm.objectives.terms.fast_clip import FastClip
from vlm.similarity.exchange import Exchange
from vlm.training.ema import Ema, EmaConfig
from vlm.training.engines.base import Engine
from vlm.training.engines.options import EngineOptions
from vlm.training.engines.registry import EngineName
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.spikes import GuardConfig, SpikeWatch
from vlm.training.state import local_memory, memory_groups, restore_memory, restore_state, state_groups
from vlm.training.step import TrainState, train_step
from vlm.training.teacher import Teacher, TeacherConfig

BAD_STEP = 2
NUM_STEPS = 4
WAYS: list[tuple[EngineName, int]] = [("ddp", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]

MANIFEST = Manifest(
    step=NUM_STEPS, samples=0, num_updates=0, world_size=2, engine="ddp", threads=1, model={}, data={}, versions={}
)


def state_with_memory(engine: Engine, poison: Poison | None) -> TrainState:
    """The toy with a queue, a table of samples, a teacher and an average."""
    terms = {**TERMS, "fast_clip": FastClip(), **({} if poison is None else {"poison": poison})}
    facts = RunFacts(16, 40, NUM_STEPS, 2, 0, engine.world)
    objective = Objective(terms, {"queue": Queue(size=20)}, Exchange(engine.world), facts)
    return TrainState(engine, objective, Ema(EmaConfig(decay=0.9), engine), Teacher(TeacherConfig(decay=0.9), engine))


def state_of(state: TrainState) -> dict[str, Tensor]:
    """All that lasts from step to step on this rank, copied."""
    with torch.no_grad():
        groups = state_groups(state.engine, state.ema, state.teacher) | memory_groups(state.objective)
        saved = {f"{group}.{name}": read(name) for group, (sizes, read) in groups.items() for name in sizes}
    tensors = {name: (one.values if isinstance(one, Part) else one).clone() for name, one in saved.items()}
    own = {name: tensor.clone() for part in local_memory(state.objective).values() for name, tensor in part.items()}
    return {**tensors, **own, "updates": torch.tensor(state.engine.num_updates())}


def run(
    setup: Setup, world_size: int, steps: tuple[int, ...], poison: Poison | None, rows: int | None, folder: str = ""
) -> Any:
    """The state before and after the bad step and at the end, and which steps were left out.

    With a `folder`, then also the states after spikes, after one more step, back at the end, and after the same step.
    """
    engine = start(setup, world_size)
    state = state_with_memory(engine, poison)
    plan = MicroBatchPlan(GLOBAL_BATCH, world_size, rows)
    left_out, states = [], {}
    engine.module.train()
    engine.warm_up(toy_batch(0, engine.world.rank, world_size))
    for step in steps:
        states[f"before {step}"] = state_of(state)
        if train_step(state, toy_batch(step, engine.world.rank, world_size), plan, seed=0, lr=1e-3).left_out:
            left_out.append(step)
    states["end"] = state_of(state)
    if folder:
        states |= spikes_and_a_way_back(state, plan, Path(folder))
    engine.accelerator.end_training()
    return left_out, states


def spikes_and_a_way_back(state: TrainState, plan: MicroBatchPlan, folder: Path) -> dict[str, Any]:
    """The states after a spike of each figure, after a usual step, back at a checkpoint, and after the step again."""
    engine, states = state.engine, dict[str, Any]()
    batch = toy_batch(NUM_STEPS, engine.world.rank, engine.world.size)
    groups = state_groups(engine, state.ema, state.teacher) | memory_groups(state.objective)
    manifest = MANIFEST.model_copy(update={"num_updates": engine.num_updates()})
    with torch.no_grad():
        checkpoint = write_checkpoint(folder, manifest, groups, engine.world, local_memory(state.objective))
    for figure in ("loss", "grad_norm"):
        watch = SpikeWatch(GuardConfig(figures=(figure,), window=3))
        watch.restore(SpikeRecord(losses=(1e-4,) * 3, norms=(1e-4,) * 3))
        result = train_step(replace(state, spikes=watch), batch, plan, seed=0, lr=1e-3)
        states[figure] = state_of(state)
        states[f"spike of {figure}"] = result.spike
        engine.most_norm = math.inf
    for name in ("later", "later again"):
        train_step(state, batch, plan, seed=0, lr=1e-3)
        states[name] = state_of(state)
        if name == "later":
            restore_state(Checkpoint(checkpoint), engine, state.ema, state.teacher)
            restore_memory(Checkpoint(checkpoint), state.objective)
            states["back"] = state_of(state)
    return states


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "kind", "rank", "rows", "options"),
    [
        (("ddp", 1), "gradient", 0, 5, {}),
        (("ddp", 2), "inf", 1, None, {}),
        (("zero1", 2), "infinite gradient", 1, None, {}),
        (("zero2", 2), "nan", 1, 3, {}),
        (("zero2", 2), "nan", 1, 3, {"offload": {"optimizer": "cpu"}}),
        (("zero3", 2), "-inf", 0, None, {}),
        (("fsdp", 2), "nan", 1, 3, {}),
    ],
)
def test_a_bad_step_leaves_every_bit_as_it_was(
    tmp_path: Path, way: tuple[EngineName, int], kind: Any, rank: int, rows: int | None, options: dict[str, Any]
) -> None:
    """So does a spike of the loss or of the norm; and a state that is put back amid a run goes on to the same bits."""
    engine, world_size = way
    poison = Poison(steps=(BAD_STEP,), rank=rank, kind=kind)
    folder = str(tmp_path)
    setup = Setup(engine, options=EngineOptions.model_validate(options))
    spoiled = run_ranks(run, world_size, setup, world_size, (0, 1, 2, 3), poison, rows, folder, group=False)
    for left_out, states in spoiled:
        assert left_out == [BAD_STEP]
        assert_equal(states["before 3"], states["before 2"])
        assert states["end"]["updates"] == NUM_STEPS - 1
        for same, other in (("loss", "end"), ("grad_norm", "end"), ("back", "end"), ("later again", "later")):
            assert_equal(states[same], states[other])
        assert states["later"]["updates"] == NUM_STEPS
        for figure in ("loss", "grad_norm"):
            assert (states[f"spike of {figure}"].figure, states[f"spike of {figure}"].median) == (figure, 1e-4)
            assert states[f"spike of {figure}"] == spoiled[0][1][f"spike of {figure}"]
    if engine != "ddp" or rows is None:
        return
    # The same run without that step: none of its random numbers depend on how many steps there were.
    without = run_ranks(run, world_size, setup, world_size, (0, 1, 3), poison, rows, group=False)
    for (_, states), (_, expected) in zip(spoiled, without, strict=True):
        assert_equal(states["end"], expected["end"])


def as_checkpoint(setup: Setup, folder: str, spoil: str) -> str:
    """The error when a state with a NaN is to be saved."""
    engine = start(setup, 2)
    state = state_with_memory(engine, None)
    manifest = Manifest(
        step=7, samples=0, num_updates=0, world_size=2, engine=setup.engine, threads=1, model={}, data={}, versions={}
    )

    def save() -> None:
        with torch.no_grad():
            groups = state_groups(engine, state.ema) | memory_groups(state.objective)
            pieces = {"own": {"queue/image": torch.full((3,), float(spoil) if engine.world.rank == 1 else -torch.inf)}}
            write_checkpoint(Path(folder), manifest, groups, engine.world, pieces)

    with pytest.raises(EveryRankError) as caught:
        save()
    engine.accelerator.end_training()
    return str(caught.value)


@pytest.mark.slow
def test_what_is_no_number_is_not_saved(tmp_path: Path) -> None:
    for said in run_ranks(as_checkpoint, 2, Setup("ddp"), str(tmp_path), "nan", group=False):
        assert "step-00000007 cannot be written (own-00001.safetensors: own of queue/image holds what is no" in said
    assert list(tmp_path.iterdir()) == []
