"""Engine-neutral checkpoints: named fp32 tensors as safetensors, each rank writing its share, under a JSON manifest.

    step-00000100/
        manifest.json                  step, what ran, size and SHA-256 of every file below, and a checksum of its own
        weights-00000.safetensors      one file a group and a rank: weights, exp_avg, exp_avg_sq, ema
        ...

Written under another name, checked, then renamed. Loading reads JSON and safetensors only, and no file
before its checksum was compared: nothing is ever unpickled.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vlm.aside import remove_files
from vlm.atomic import flush_to_disk, sha256, write_text
from vlm.checkpoint.folder import FILES, MANIFEST, PARTIAL, folder_name, remove_checkpoint
from vlm.checkpoint.manifest import FileRecord, Manifest, read_manifest
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError, reason
from vlm.paths import below
from vlm.sealed import sealed_json
from vlm.tensor_file import save_tensors

TERM_PARAMETERS = "term_parameters."

# One group of tensors: their names with sizes in elements, and how all ranks together get one of them whole.
Group = tuple[dict[str, int], Callable[[str], Tensor]]


def write_checkpoint(
    folder: Path,
    manifest: Manifest,
    groups: dict[str, Group],
    world: World,
    local_groups: dict[str, dict[str, Tensor]] | None = None,
) -> Path:
    """Write a checkpoint below `folder` and return its path. Collective; a crash leaves no half checkpoint.

    `local_groups` are groups of which each rank has tensors of its own, under names that others may have too.

    Raises:
        EveryRankError: a tensor holds NaN or +inf, or the disk is full; what was there before stays as it was.
    """
    target = folder / folder_name(manifest.step)
    aside = folder / f"{target.name}{PARTIAL}"
    if world.is_main:
        remove_files(aside, FILES)
        aside.mkdir(parents=True, exist_ok=True)
    world.barrier()
    files: dict[str, FileRecord] = {}
    problem = None
    for group, tensors in _local_tensors(groups, local_groups or {}, world):
        path = aside / f"{group}-{world.rank:05d}.safetensors"
        try:
            # After a failure the others' tensors still need this rank's parts of them.
            if problem is None:
                _require_numbers(group, tensors)
                save_tensors(path, tensors)
                files[path.name] = FileRecord(bytes=path.stat().st_size, sha256=sha256(path))
        except UserError as error:
            problem = f"{path.name}: {reason(error)}"
        except (OSError, SafetensorError) as error:
            problem = f"{path.name}: {reason(error)}; {_room_words(folder, groups, local_groups or {})}"
    outcomes = world.gather_objects((files, problem))
    problem = next((message for _, message in outcomes if message is not None), None)
    if problem is None:
        written = {name: record for names, _ in outcomes for name, record in names.items()}
        complete = manifest.model_copy(update={"files": dict(sorted(written.items()))})
        (problem,) = world.gather_objects(_complete(aside, target, complete) if world.is_main else None)[:1]
    if problem is not None:
        if world.is_main:
            remove_files(aside, FILES)
        raise EveryRankError(
            f"checkpoint {target} cannot be written ({problem}); those before it are whole: --resume auto goes on"
        )
    return target


def _room_words(folder: Path, groups: dict[str, Group], local_groups: dict[str, dict[str, Tensor]]) -> str:
    """How much a checkpoint takes, which is fp32 but for a few buffers, and how much is free."""
    numbers = sum(size for sizes, _ in groups.values() for size in sizes.values())
    local_bytes = sum(tensor.nbytes for tensors in local_groups.values() for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    return f"it takes about {(4 * numbers + local_bytes) / 1e9:.3g} GB, {free / 1e9:.3g} GB are free there"


def _local_tensors(
    groups: dict[str, Group], local_groups: dict[str, dict[str, Tensor]], world: World
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors that this rank has to write, group by group, copied to the CPU. Collective."""
    for group, (sizes, full_tensor) in groups.items():
        owners = _owners(sizes, world.size)
        owned = {}
        for name in sizes:
            tensor = full_tensor(name)  # every rank takes part, the owner keeps it
            if owners[name] == world.rank:
                owned[name] = _copy(tensor)
        if owned:
            yield group, owned
    for group, tensors in local_groups.items():
        yield group, {name: _copy(tensor) for name, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _require_numbers(group: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for NaN or +inf in a tensor; -inf stands for "none yet", and in masks."""
    for name, tensor in tensors.items():
        if not bool((tensor < math.inf).all()):
            raise UserError(f"{group} of {name} holds what is no finite number")


def _complete(aside: Path, target: Path, manifest: Manifest) -> str | None:
    """Describe and check what lies aside, then give it its name; what kept it from that, in words."""
    try:
        write_text(aside / MANIFEST, sealed_json(manifest.model_dump(mode="json")))
        for name, record in manifest.files.items():
            _check_file(aside, name, record)
        flush_to_disk(aside)
        if target.exists():
            remove_checkpoint(target)
        aside.rename(target)
        flush_to_disk(target.parent)
    except (OSError, UserError) as error:
        return reason(error)
    return None


def _owners(sizes: dict[str, int], num_ranks: int) -> dict[str, int]:
    """Which rank writes which tensor: consecutive runs of about equal bytes."""
    total = max(1, sum(sizes.values()))
    owners, before = {}, 0
    for name, size in sizes.items():
        owners[name] = min(num_ranks - 1, before * num_ranks // total)
        before += size
    return owners


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
        self._where: dict[str, dict[str, Path]] = {}
        self._verified: set[str] = set()
        for name in self.manifest.files:
            if not below(folder, name, f"checkpoint {folder}").is_file():
                raise UserError(f"checkpoint {folder}: {name} is missing")

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
