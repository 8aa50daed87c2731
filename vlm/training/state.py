"""What a run must remember, gathered from the engine into a checkpoint and put back from one."""

from collections.abc import Callable

import torch

from vlm.errors import UserError
from vlm.training.checkpoint import Checkpoint, Group, first_differences
from vlm.training.ema import Ema
from vlm.training.engine import MOMENTS, Engine, Moment


def state_groups(engine: Engine, ema: Ema | None) -> dict[str, Group]:
    """The tensors of a run as groups for `write_checkpoint`: weights and buffers, AdamW's moments, the average."""
    trainable = {name: _numel(shape) for name, shape in engine.shapes.items() if name in engine.parameters()}
    groups: dict[str, Group] = {
        "weights": ({name: _numel(shape) for name, shape in engine.shapes.items()}, engine.weight)
    }
    for kind in MOMENTS:
        groups[kind] = (trainable, _moment_reader(engine, kind))
    if ema is not None:
        groups["ema"] = (trainable, ema.whole)
    return groups


@torch.no_grad()
def restore_state(checkpoint: Checkpoint, engine: Engine, ema: Ema | None) -> None:
    """Put weights, moments and the average back, whatever engine and world size wrote them. Collective."""
    differences = first_differences(engine.shapes, checkpoint.shapes("weights"))
    if differences:
        raise UserError(f"checkpoint {checkpoint.folder} is of another architecture: {differences}")
    for name in engine.shapes:
        engine.load_weight(name, checkpoint.tensor("weights", name))
    moments = {kind: checkpoint.tensors(kind) for kind in MOMENTS}
    by_name: dict[str, dict[Moment, torch.Tensor]] = {
        name: {kind: moments[kind][name] for kind in MOMENTS} for name in engine.parameters()
    }
    engine.load_moments(by_name, checkpoint.manifest.num_updates)
    if ema is not None:
        group = "ema" if checkpoint.names("ema") else "weights"
        for name in ema.shards:
            ema.load(name, checkpoint.tensor(group, name))


def _moment_reader(engine: Engine, kind: Moment) -> Callable[[str], torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        moment = engine.moment(name, kind)
        return torch.zeros(engine.shapes[name]) if moment is None else moment

    return read


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
