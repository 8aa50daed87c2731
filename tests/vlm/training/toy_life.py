"""A life of the toy under an engine: from a checkpoint to some step, with everything that it has then."""

from pathlib import Path

import torch
from torch import Tensor

from tests.vlm.training.toy import WHOLE, Setup, start, toy_batch, train_state
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.manifest import Manifest
from vlm.checkpoint.writer import write_checkpoint
from vlm.training.engines.base import Engine
from vlm.training.state import restore_state, state_groups
from vlm.training.step import train_step


def life(setup: Setup, world_size: int, folder: str, first: int, last: int, lr: float) -> dict[str, Tensor]:
    """Steps `first` to `last`, from the folder's checkpoint where there is one; all weights and moments after them.

    A checkpoint is written after half of the steps, and after the last.
    """
    engine = start(setup, world_size)
    if first:
        restore_state(Checkpoint(Path(folder) / f"step-{first:08d}"), engine, None)
    state = train_state(engine)
    for step in range(first, last):
        batch = toy_batch(step, engine.world.rank, world_size)
        if step == first:
            engine.warm_up(batch)
        train_step(state, batch, WHOLE, seed=0, lr=lr)
        if step + 1 in ((first + last) // 2, last):
            save(engine, folder, step + 1)
    whole = whole_state(engine)
    engine.accelerator.end_training()
    return whole


@torch.no_grad()
def save(engine: Engine, folder: str, step: int) -> None:
    manifest = Manifest(
        step=step,
        samples=0,
        num_updates=engine.num_updates(),
        world_size=engine.world.size,
        engine=engine.settings.name,
        threads=1,
        model={},
        data={},
        versions={},
    )
    write_checkpoint(Path(folder), manifest, state_groups(engine, None), engine.world)


@torch.no_grad()
def whole_state(engine: Engine) -> dict[str, Tensor]:
    """All weights and moments, whole, as `weights/NAME` and `MOMENT/NAME`."""
    whole = {f"weights/{name}": engine.weight(name).clone() for name in engine.shapes}
    for name, kinds in engine.moments.items():
        for kind in kinds:
            if (moment := engine.moment(name, kind)) is not None:
                whole[f"{kind}/{name}"] = moment.clone()
    return whole
