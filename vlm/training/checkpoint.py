"""Engine-neutral checkpoints: named fp32 tensors as safetensors, each rank writing its share, under a JSON manifest.

    step-00000100/
        manifest.json                  step, what ran, and size and SHA-256 of every file below
        weights-00000.safetensors      one file a group and a rank: weights, exp_avg, exp_avg_sq, ema
        ...

Written under another name, checked, then renamed. Loading reads JSON and safetensors only: nothing is ever unpickled.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vlm.atomic import flush_to_disk, sha256, write_text
from vlm.config import Config
from vlm.errors import UserError
from vlm.tensor_file import save_tensors
from vlm.world import World

MANIFEST = "manifest.json"
FORMAT = "vlm-checkpoint-1"
TERM_PARAMETERS = "term_parameters."
_FOLDER = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial"


class FileRecord(Config):
    """What must be true of one file of a checkpoint."""

    bytes: int
    sha256: str


class Manifest(Config):
    """What a checkpoint holds and where it comes from; all but the tensors."""

    format: str = FORMAT
    step: int
    samples: int
    num_updates: int
    world_size: int
    engine: str
    threads: int
    model: dict[str, Any]
    data: dict[str, int]
    stream: dict[str, Any] = Field(default={}, description="what the data must remember besides the step")
    counts: dict[str, int] = Field(default={}, description="rows of each source and field since the last log line")
    versions: dict[str, str]
    files: dict[str, FileRecord] = Field(default={})


def folder_name(step: int) -> str:
    """The name of the checkpoint folder after `step` steps."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """After how many steps the checkpoint in a folder of this name was written."""
    return int(folder.name.rpartition("-")[2])


def complete_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints below `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if _FOLDER.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: path.name)


def clear_unfinished(folder: Path) -> None:
    """Remove what a crash left of checkpoints that were never completed."""
    for path in folder.glob(f"*{_PARTIAL}"):
        shutil.rmtree(path)


# One group of tensors: their names with sizes in elements, and how all ranks together get one of them whole.
Group = tuple[dict[str, int], Callable[[str], Tensor]]


def write_checkpoint(
    folder: Path,
    manifest: Manifest,
    groups: dict[str, Group],
    world: World,
    pieces: dict[str, dict[str, Tensor]] | None = None,
) -> Path:
    """Write a checkpoint below `folder` and return its path. Collective; a crash leaves no half checkpoint.

    `pieces` are groups of which each rank has tensors of its own, under names that others may have too.
    """
    target = folder / folder_name(manifest.step)
    aside = folder / f"{target.name}{_PARTIAL}"
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    world.barrier()
    files: dict[str, FileRecord] = {}
    for group, (sizes, whole) in groups.items():
        path = aside / f"{group}-{world.rank:05d}.safetensors"
        if _write_share(path, sizes, whole, world):
            files[path.name] = FileRecord(bytes=path.stat().st_size, sha256=sha256(path))
    for group, tensors in (pieces or {}).items():
        path = aside / f"{group}-{world.rank:05d}.safetensors"
        save_tensors(path, {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
        files[path.name] = FileRecord(bytes=path.stat().st_size, sha256=sha256(path))
    written = {name: record for share in world.gather_objects(files) for name, record in share.items()}
    if world.is_main:
        complete = manifest.model_copy(update={"files": dict(sorted(written.items()))})
        write_text(aside / MANIFEST, complete.model_dump_json(indent=2))
        _check_files(aside, complete.files)
        flush_to_disk(aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        flush_to_disk(folder)
    world.barrier()
    return target


def _write_share(path: Path, sizes: dict[str, int], whole: Callable[[str], Tensor], world: World) -> bool:
    owners = _owners(sizes, world.size)
    share = {}
    for name in sizes:
        tensor = whole(name)  # every rank takes part, the owner keeps it
        if owners[name] == world.rank:
            share[name] = tensor.detach().cpu().contiguous().clone()
    if share:
        save_tensors(path, share)
    return bool(share)


def _owners(sizes: dict[str, int], num_ranks: int) -> dict[str, int]:
    """Which rank writes which tensor: consecutive runs of about equal bytes."""
    total = max(1, sum(sizes.values()))
    owners, before = {}, 0
    for name, size in sizes.items():
        owners[name] = min(num_ranks - 1, before * num_ranks // total)
        before += size
    return owners


def _check_files(folder: Path, files: dict[str, FileRecord], names: Iterable[str] | None = None) -> None:
    for name in files if names is None else names:
        path, record = folder / name, files[name]
        if not path.is_file():
            raise UserError(f"checkpoint {folder}: {name} is missing")
        if path.stat().st_size != record.bytes or sha256(path) != record.sha256:
            raise UserError(f"checkpoint {folder}: {name} is damaged (its bytes do not match the manifest's SHA-256)")


class Checkpoint:
    """A complete checkpoint on disk; tensors are read one by one, by group and name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(f"{folder} is no checkpoint: it has no {MANIFEST}")
        try:
            self.manifest = Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (ValidationError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is not a readable manifest: {str(error).splitlines()[0]}") from None
        if self.manifest.format != FORMAT:
            raise UserError(f"{path}: format {self.manifest.format!r} is not {FORMAT!r}")
        self._where: dict[str, dict[str, Path]] = {}
        for name in self.manifest.files:
            if not (folder / name).is_file():
                raise UserError(f"checkpoint {folder}: {name} is missing")

    def verify(self, world: World) -> None:
        """Compare every file with its checksum, the ranks sharing the work. Raises UserError on a damaged file."""
        _check_files(self.folder, self.manifest.files, list(self.manifest.files)[world.rank :: world.size])

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

    def pieces(self, group: str) -> list[dict[str, Tensor]]:
        """What each rank had of its own in a group when this was written, in rank order, on the CPU."""
        names = sorted(name for name in self.manifest.files if name.rsplit("-", 1)[0] == group)
        return [load_file(self.folder / name) for name in names]

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
                    with safe_open(self.folder / file_name, framework="pt") as file:
                        places.update(dict.fromkeys(file.keys(), self.folder / file_name))
            self._where[group] = places
        return self._where[group]


def first_differences(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], count: int = 3
) -> str | None:
    """Words on the first tensors in which two sets of weights differ; None when they agree."""
    words = []
    for name in [*expected, *(name for name in found if name not in expected)]:
        if name not in found:
            words.append(f"{name} is missing")
        elif name not in expected:
            words.append(f"{name} is not in the model")
        elif expected[name] != found[name]:
            words.append(f"{name} is {list(found[name])} but the model has {list(expected[name])}")
        if len(words) == count:
            break
    return "; ".join(words) or None


def prune(folder: Path, keep: int | None, good_steps: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints (None: keep all) and the newest up to each of `good_steps`."""
    if keep is None:
        return
    complete = complete_checkpoints(folder)
    good = {max((path for path in complete if step_of(path) <= step), key=step_of, default=None) for step in good_steps}
    for path in complete[:-keep]:
        if path in good:
            continue
        doomed = path.with_name(path.name + _PARTIAL)
        os.rename(path, doomed)
        shutil.rmtree(doomed)
