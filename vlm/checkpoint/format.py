"""Engine-neutral checkpoints: named fp32 tensors as safetensors, files of each rank, under a JSON manifest.

    step-00000100/
        manifest.json                  step, what ran, size and SHA-256 of every file below, and a checksum of its own
        weights-00000.safetensors      one file a group and a rank: weights, exp_avg, exp_avg_sq, ema
        ...

`writer` writes them. Loading reads JSON and safetensors only, and no file before its checksum was compared: nothing is
ever unpickled.
"""

import weakref
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vlm.atomic import sha256
from vlm.checkpoint.folder import hold, let_go
from vlm.checkpoint.manifest import FileRecord, read_manifest
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
        self._where: dict[str, dict[str, Path]] = {}
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
        shapes = {}
        for name, path in self._places(group).items():
            with safe_open(path, framework="pt") as file:
                shapes[name] = tuple(file.get_slice(name).get_shape())
        return shapes

    def tensor(self, group: str, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with safe_open(self._places(group)[name], framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group by name, on the CPU."""
        return {name: self.tensor(group, name) for name in self.names(group)}

    def by_rank(self, group: str) -> list[dict[str, Tensor]]:
        """The tensors that each rank had of its own in a group when this was written, in rank order, on the CPU."""
        names = sorted(name for name in self.manifest.files if name.rsplit("-", 1)[0] == group)
        return [load_file(self._checked(name)) for name in names]

    def inference_weights(self) -> dict[str, Tensor]:
        """The weights and buffers to use the model with: the averaged ones where the run kept an average.

        What the objective's terms learned beside the model is left out.
        """
        weights = self.tensors("weights") | self.tensors("ema")
        return {name: tensor for name, tensor in weights.items() if not name.startswith(TERM_PARAMETERS)}

    def _places(self, group: str) -> dict[str, Path]:
        if group not in self._where:
            places: dict[str, Path] = {}
            for file_name in self.manifest.files:
                if file_name.rsplit("-", 1)[0] == group:
                    path = self._checked(file_name)
                    with safe_open(path, framework="pt") as file:
                        places.update(dict.fromkeys(file.keys(), path))
            self._where[group] = places
        return self._where[group]


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
