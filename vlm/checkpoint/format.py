"""Engine-neutral checkpoints: named fp32 tensors as safetensors, files of each rank, under a JSON manifest.

    step-00000100/
        manifest.json                  step, what ran, size and SHA-256 of every file below, and a checksum of its own
        weights-00000.safetensors      one file a group and a rank: weights, exp_avg, exp_avg_sq, ema
        ...

A tensor is whole in one file, or in parts, a run of its elements in each file, as that file's metadata tells (`parts`).
`writer` writes them. Loading reads JSON and safetensors only, and no file before its checksum was compared: nothing is
ever unpickled.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm.atomic import sha256
from vlm.checkpoint.folder import hold, let_go
from vlm.checkpoint.manifest import FileRecord, read_manifest
from vlm.checkpoint.parts import Piece, in_order, read_cut
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError, reason
from vlm.paths import below

TERM_PARAMETERS = "term_parameters."


def _check_file(folder: Path, name: str, record: FileRecord) -> None:
    path = folder / name
    try:
        right = path.stat().st_size == record.bytes and sha256(path) == record.sha256
    except FileNotFoundError:
        raise UserError(f"checkpoint {folder}: {name} is missing") from None
    except OSError as error:
        raise UserError(f"checkpoint {folder}: {name} cannot be read: {reason(error)}") from None
    if not right:
        raise UserError(f"checkpoint {folder}: {name} is damaged (its bytes do not match the manifest's SHA-256)")


class Checkpoint:
    """A complete checkpoint on disk; tensors are read one by one, by group and name.

    A file is compared with its checksum before the first tensor is read from it, unless `verify` has done so.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        held = hold(folder)
        self._held = None if held is None else weakref.finalize(self, let_go, held)
        self._where: dict[str, dict[str, list[Piece]]] = {}
        self._verified: set[str] = set()
        for name in self.manifest.files:
            if not below(folder, name, f"checkpoint {folder}").is_file():
                raise UserError(f"checkpoint {folder}: {name} is missing")

    def release(self) -> None:
        """Let whoever prunes the run have it: nothing more is read. Else that is so when this object goes."""
        if self._held is not None:
            self._held()

    def verify(self, world: World) -> None:
        """Compare every file with its checksum, the ranks sharing the work. Collective.

        Raises:
            EveryRankError: a file is damaged, whichever rank found it.
        """
        problem = None
        try:
            for name in list(self.manifest.files)[world.rank :: world.size]:
                self._checked(name)
        except UserError as error:
            problem = str(error)
        for message in world.gather_objects(problem):
            if message is not None:
                raise EveryRankError(message)
        self._verified.update(self.manifest.files)

    def _checked(self, name: str) -> Path:
        """The path of a file that is as it was written."""
        if name not in self._verified:
            _check_file(self.folder, name, self.manifest.files[name])
            self._verified.add(name)
        return self.folder / name

    def names(self, group: str) -> list[str]:
        """The names of the tensors in a group, empty when the checkpoint has no such group."""
        return list(self._places(group))

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """The shapes of a group's tensors by name."""
        return {name: pieces[0].shape for name, pieces in self._places(group).items()}

    def tensor(self, group: str, name: str) -> Tensor:
        """One tensor, whole, on the CPU."""
        pieces = self._places(group)[name]
        if pieces[0].start is None:
            return self._read(pieces[0], name)
        return torch.cat([self._read(piece, name) for piece in pieces]).view(pieces[0].shape)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group by name, on the CPU."""
        return {name: self.tensor(group, name) for name in self.names(group)}

    def by_rank(self, group: str) -> list[dict[str, Tensor]]:
        """The tensors that each rank had of its own in a group when this was written, in rank order, on the CPU."""
        found = []
        for file_name in sorted(self._files_of(group)):
            with self._opened(self._checked(file_name)) as file:
                found.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no dict
        return found

    def inference_weights(self) -> dict[str, Tensor]:
        """The weights and buffers to use the model with: the averaged ones where the run kept an average.

        What the objective's terms learned beside the model is left out.
        """
        weights = self.tensors("weights") | self.tensors("ema")
        return {name: tensor for name, tensor in weights.items() if not name.startswith(TERM_PARAMETERS)}

    def _files_of(self, group: str) -> list[str]:
        return [name for name in self.manifest.files if name.rsplit("-", 1)[0] == group]

    def _places(self, group: str) -> dict[str, list[Piece]]:
        """Where the tensors of a group lie, their parts in order."""
        if group not in self._where:
            places: dict[str, list[Piece]] = {}
            for file_name in self._files_of(group):
                for name, piece in self._pieces_in(self._checked(file_name)).items():
                    places.setdefault(name, []).append(piece)
            self._where[group] = {
                name: in_order(pieces, f"checkpoint {self.folder}: {group} of {name}")
                for name, pieces in places.items()
            }
        return self._where[group]

    def _pieces_in(self, path: Path) -> dict[str, Piece]:
        with self._opened(path) as file:
            try:
                cut = read_cut(file.metadata())
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"checkpoint {self.folder}: {path.name} has no right metadata: {reason(error)}"
                ) from None
            pieces = {}
            for name in file.keys():  # noqa: SIM118 - no dict
                shape = tuple(file.get_slice(name).get_shape())
                start, whole = cut.get(name, (None, shape))
                pieces[name] = Piece(path, whole, start, torch.Size(shape).numel())
            return pieces

    def _read(self, piece: Piece, name: str) -> Tensor:
        with self._opened(piece.file) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {self.folder}: {path.name} is no safetensors file: {reason(error)}") from None


def first_differences(
    expected: dict[str, tuple[int, ...]], actual: dict[str, tuple[int, ...]], count: int = 3
) -> str | None:
    """Words on the first tensors in which two sets of weights differ; None when they agree."""
    words = []
    for name in [*expected, *(name for name in actual if name not in expected)]:
        if name not in actual:
            words.append(f"{name} is missing")
        elif name not in expected:
            words.append(f"{name} is not in the model")
        elif expected[name] != actual[name]:
            words.append(f"{name} is {list(actual[name])} but the model has {list(expected[name])}")
        if len(words) == count:
            break
    return "; ".join(words) or None
