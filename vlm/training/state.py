"""The state that a run must remember, gathered from the engine into a checkpoint and put back from one."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from vlm.checkpoint.format import Checkpoint, first_differences
from vlm.checkpoint.parts import Saved
from vlm.checkpoint.writer import Group
from vlm.errors import UserError
from vlm.objectives.objective import Objective
from vlm.training.ema import Ema
from vlm.training.engines.base import Engine
from vlm.training.model_files import MODEL_FILES, file_group
from vlm.training.teacher import Teacher

MEMORY, LOCAL_MEMORY = "memory", "own"


def state_groups(engine: Engine, ema: Ema | None, teacher: Teacher | None = None) -> dict[str, Group]:
    """The tensors of a run as groups for `write_checkpoint`: weights and buffers, moments, averages, files."""
    trainable = {name: _numel(shape) for name, shape in engine.shapes.items() if name in engine.parameters()}
    groups: dict[str, Group] = {
        "weights": ({name: _numel(shape) for name, shape in engine.shapes.items()}, engine.saved_weight)
    }
    for moment, kept in _by_moment(engine).items():
        groups[moment] = ({name: _numel(shape) for name, shape in kept.items()}, _moment_reader(engine, moment))
    if ema is not None:
        groups["ema"] = (trainable, ema.saved)
    if teacher is not None:
        groups["teacher"] = (trainable, teacher.average.saved)
    if files := getattr(engine.module, "files", None):
        groups[MODEL_FILES] = file_group(files)
    return groups


def memory_groups(objective: Objective) -> dict[str, Group]:
    """The memory of terms that every rank has alike, as a group for `write_checkpoint`."""
    tensors = {
        f"{name}/{key}": tensor
        for name, state in objective.states.items()
        for key, tensor in state.replicated().items()
    }
    return {MEMORY: ({name: tensor.numel() for name, tensor in tensors.items()}, tensors.__getitem__)}


def local_memory(objective: Objective) -> dict[str, dict[str, torch.Tensor]]:
    """The memory of terms on this rank alone, as a piece for `write_checkpoint`."""
    tensors = {
        f"{name}/{key}": tensor for name, state in objective.states.items() for key, tensor in state.local().items()
    }
    return {LOCAL_MEMORY: tensors} if tensors else {}


def restore_memory(checkpoint: Checkpoint, objective: Objective) -> None:
    """Put back what terms remember, whatever world size wrote it."""
    replicated, by_rank = checkpoint.tensors(MEMORY), checkpoint.by_rank(LOCAL_MEMORY)
    for name, state in objective.states.items():
        state.restore(_of(name, replicated), [_of(name, tensors) for tensors in by_rank])


def _of(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@torch.no_grad()
def restore_state(checkpoint: Checkpoint, engine: Engine, ema: Ema | None, teacher: Teacher | None = None) -> None:
    """Put weights, moments and averages back, whatever engine and world size wrote them. Collective."""
    differences = first_differences(engine.shapes, checkpoint.shapes("weights"))
    if differences:
        raise UserError(f"checkpoint {checkpoint.folder} is of another architecture: {differences}")
    for moment, kept in _by_moment(engine).items():
        differences = first_differences(kept, checkpoint.shapes(moment))
        if differences:
            raise UserError(
                f"checkpoint {checkpoint.folder}: other weights were trained there ({moment}): {differences}"
            )
    for name in engine.shapes:
        engine.load_weight(name, checkpoint.tensor("weights", name))
    moments = {name: _MomentsOf(checkpoint, name, kept) for name, kept in engine.moments.items()}
    engine.load_moments(moments, checkpoint.manifest.num_updates)
    for average_name, average in (("ema", ema), ("teacher", None if teacher is None else teacher.average)):
        group = average_name if checkpoint.names(average_name) else "weights"
        if average is not None:
            for name in average.shards:
                average.load(name, checkpoint.tensor(group, name))


class _MomentsOf(Mapping[str, torch.Tensor]):
    """The moments of one parameter, each read when it is asked for: all of them are twice the model."""

    def __init__(self, checkpoint: Checkpoint, name: str, moments: Iterable[str]) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._moments = tuple(moments)

    def __getitem__(self, moment: str) -> torch.Tensor:
        return self._checkpoint.tensor(moment, self._name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)


def _moment_reader(engine: Engine, moment: str) -> Callable[[str], Saved]:
    def read(name: str) -> Saved:
        values = engine.saved_moment(name, moment)
        if values is not None:
            return values
        kept = engine.moments[name][moment]
        return torch.zeros(kept.shape, dtype=kept.dtype)

    return read


def _by_moment(engine: Engine) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the optimizer's moments, by that of which they are the moments."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, kept in engine.moments.items():
        for moment, one in kept.items():
            shapes.setdefault(moment, {})[name] = one.shape
    return shapes


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
