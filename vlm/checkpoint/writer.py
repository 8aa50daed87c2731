"""The writing of checkpoints: all ranks copy their share, and write it in a thread while training goes on.

A checkpoint is written under another name, each file hashed on its way and flushed to the disk, and renamed when all
ranks are done. A crash, or `kill -9`, at any moment loses that one alone.
"""

import math
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vlm.activity import activity
from vlm.aside import remove_files
from vlm.atomic import flush_to_disk, write_text
from vlm.checkpoint.folder import FILES, MANIFEST, PARTIAL, folder_name, remove_checkpoint
from vlm.checkpoint.manifest import FileRecord, Manifest
from vlm.checkpoint.parts import Part, Saved, cut_metadata
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError, reason
from vlm.sealed import sealed_json
from vlm.tensor_file import save_hashed

_LOOK_SECONDS = 1.0
_SLACK = 4.0  # how many times as long as a step a disk may write nothing

# One group of tensors: their names with sizes in elements, and how a rank gets what it has to write of one: its part,
# or the whole, together with all others.
Group = tuple[dict[str, int], Callable[[str], Saved]]


def write_checkpoint(
    folder: Path,
    manifest: Manifest,
    groups: dict[str, Group],
    world: World,
    local_groups: dict[str, dict[str, Tensor]] | None = None,
) -> Path:
    """Write one checkpoint below `folder` and return its path, as `Writer` does. Collective."""
    writer = Writer(folder, world, background=False)
    writer.begin(manifest, groups, local_groups)
    return writer.complete()


class Writer:
    """Writes the checkpoints of a run below one folder, never two at once.

    In the background, training waits only while each rank copies its share to the host: one copy, in memory that is
    kept for the next. Else a group is copied and written at a time.
    """

    def __init__(self, folder: Path, world: World, *, background: bool = True) -> None:
        self._folder = folder
        self._world = world
        self._background = background
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._share: _Share | None = None
        self._thread: threading.Thread | None = None
        self._manifest: Manifest | None = None
        self._size = 0  # bytes that a checkpoint takes over all ranks, about

    @property
    def step(self) -> int | None:
        """The step of the checkpoint that is being written, the same on all ranks; None: none is."""
        return None if self._manifest is None else self._manifest.step

    @torch.no_grad()
    def begin(
        self,
        manifest: Manifest,
        groups: dict[str, Group],
        local_groups: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """Copy what is to be written, and begin to write it. Collective; the one before was completed.

        `local_groups` are groups of which each rank has tensors of its own, under names that others may have too.

        Raises:
            EveryRankError: the folder cannot be made, or a rank finds less room there than the checkpoint takes.
        """
        aside = self._folder / f"{folder_name(manifest.step)}{PARTIAL}"
        problem = _made_anew(aside) if self._world.is_main else None
        (problem, *_) = self._world.gather_objects(problem)
        problem = problem or self.lack_of_room(groups, local_groups)
        if problem is not None:
            if self._world.is_main:
                remove_files(aside, FILES)
            raise self._failed(manifest, problem)
        share = _Share(aside, self._world.rank, self._size)
        pieces = self._pieces(groups, local_groups or {})
        if self._background:
            copied = list(pieces)
            if self._world.device.type == "cuda":
                torch.cuda.current_stream(self._world.device).synchronize()  # copies that run beside each other
            # Of a process that ends for another reason nothing is completed any more: nobody waits for its thread.
            self._thread = threading.Thread(target=share.write, args=(copied,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            share.write(pieces)
        self._share, self._manifest = share, manifest

    def lack_of_room(
        self, groups: dict[str, Group] | None = None, local_groups: dict[str, dict[str, Tensor]] | None = None
    ) -> str | None:
        """Words on a rank without room for a checkpoint of these tensors, or for one as large as the last. Collective.

        A disk that does not tell how much is free has room.
        """
        mine = _bytes_of(local_groups or {}), _free(self._folder)
        everyone = self._world.gather_objects(mine)
        if groups is not None:
            self._size = _size_of(groups) + sum(size for size, _ in everyone)
        for rank, (_, free) in enumerate(everyone):
            if free is not None and free < self._size:
                return f"rank {rank}: {_room_words(self._size, free)}"
        return None

    def is_written(self) -> bool:
        """Whether all ranks have written their share, or one has failed to, so that `complete` is due. Collective."""
        done = self._thread is None or not self._thread.is_alive()
        failed = self._share is not None and self._share.problem is not None
        outcomes = torch.tensor([done, failed], dtype=torch.float32, device=self._world.device)
        num_done, num_failed = self._world.sum(outcomes).tolist()
        return bool(num_done == self._world.size or num_failed > 0)

    def complete(self) -> Path:
        """Wait until all is written, give the checkpoint its name, and return its path. Collective.

        Raises:
            EveryRankError: a tensor holds NaN or +inf, or the disk is full; what was there before stays as it was.
        """
        share, manifest = self._share, self._manifest
        if share is None or manifest is None:
            raise RuntimeError("no checkpoint is being written")
        self._wait()
        self._share, self._thread, self._manifest = None, None, None
        outcomes = self._world.gather_objects((share.files, share.problem))
        problem = next((message for _, message in outcomes if message is not None), None)
        target = self._folder / folder_name(manifest.step)
        if problem is None:
            written = {name: record for names, _ in outcomes for name, record in names.items()}
            whole = manifest.model_copy(update={"files": dict(sorted(written.items()))})
            found = _complete(share.aside, target, whole) if self._world.is_main else None
            (problem, *_) = self._world.gather_objects(found)
        if problem is not None:
            if self._world.is_main:
                remove_files(share.aside, FILES)
            raise self._failed(manifest, problem)
        return target

    def _wait(self) -> None:
        """Wait for all ranks, and see to it that a disk that is slow is not taken for a run that hangs. Collective."""
        if self._thread is None or self._share is None:
            return
        written = -1.0
        while not self.is_written():
            self._thread.join(_LOOK_SECONDS)
            so_far = self._world.sum(torch.tensor(self._share.written_bytes(), device=self._world.device)).item()
            if so_far > written:
                written = so_far
                activity.touch(_SLACK)
        self._share.is_wanted = False  # where another one failed, what is left would be written for nothing
        while self._thread.is_alive():
            activity.touch(_SLACK)
            self._thread.join(_LOOK_SECONDS)

    def _failed(self, manifest: Manifest, problem: str) -> EveryRankError:
        target = self._folder / folder_name(manifest.step)
        return EveryRankError(
            f"checkpoint {target} cannot be written ({problem}); those before it are whole: --resume auto goes on"
        )

    def _pieces(
        self, groups: dict[str, Group], local_groups: dict[str, dict[str, Tensor]]
    ) -> Iterator[tuple[str, dict[str, Saved]]]:
        """What this rank has to write, group by group, copied to the CPU. Collective.

        A rank never holds more of a sharded model than its share, but where an engine gives tensors whole: one of them.
        """
        kept, self._copies = self._copies, {}
        for group, (sizes, saved_of) in groups.items():
            owners = _owners(sizes, self._world.size)
            owned: dict[str, Saved] = {}
            for name in sizes:
                saved = saved_of(name)  # every rank takes part
                if isinstance(saved, Part):
                    if saved.values.numel():
                        owned[name] = replace(saved, values=self._copy(group, name, saved.values, kept))
                elif owners[name] == self._world.rank:
                    owned[name] = self._copy(group, name, saved, kept)
            if owned:
                yield group, owned
        for group, tensors in local_groups.items():
            yield group, {name: self._copy(group, name, tensor, kept) for name, tensor in tensors.items()}

    def _copy(self, group: str, name: str, tensor: Tensor, kept: dict[tuple[str, str], Tensor]) -> Tensor:
        copy = kept.pop((group, name), None)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            # A GPU copies into memory that cannot be moved several times faster, and without being waited for.
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda and self._background)
        copy.copy_(tensor, non_blocking=tensor.is_cuda and self._background)
        if self._background:
            self._copies[group, name] = copy
        return copy


class _Share:
    """What one rank writes of a checkpoint: the files that are whole, or what kept it from writing one.

    `size` is that of the whole checkpoint in bytes, about.
    """

    def __init__(self, aside: Path, rank: int, size: int) -> None:
        self.aside = aside
        self.files: dict[str, FileRecord] = {}
        self.problem: str | None = None
        self.is_wanted = True
        self._rank = rank
        self._size = size

    def written_bytes(self) -> float:
        """The bytes that lie there until now."""
        return float(sum(file.stat().st_size for file in self.aside.glob(f"*-{self._rank:05d}.safetensors")))

    def write(self, pieces: Iterable[tuple[str, Mapping[str, Saved]]]) -> None:
        """Write group after group. After a failure the rest is gone through all the same: others wait for it."""
        for group, tensors in pieces:
            if self.problem is None and self.is_wanted:
                self._write(group, tensors)

    def _write(self, group: str, saved: Mapping[str, Saved]) -> None:
        path = self.aside / f"{group}-{self._rank:05d}.safetensors"
        parts = {name: one for name, one in saved.items() if isinstance(one, Part)}
        tensors = {name: one.values if isinstance(one, Part) else one for name, one in saved.items()}
        try:
            _require_numbers(group, tensors)
            size, digest = save_hashed(path, tensors, cut_metadata(parts))
            self.files[path.name] = FileRecord(bytes=size, sha256=digest)
        except UserError as error:
            self.problem = f"{path.name}: {reason(error)}"
        except Exception as error:  # in a thread of its own nothing else would tell of it
            self.problem = f"{path.name}: {reason(error)}; {_room_words(self._size, _free(self.aside))}"


def _made_anew(aside: Path) -> str | None:
    """Make the folder that is written to; what kept it from that, in words."""
    try:
        remove_files(aside, FILES)
        aside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{aside}: {error.strerror or reason(error)}"
    return None


def _size_of(groups: dict[str, Group]) -> int:
    """About how many bytes groups take, which are fp32 but for a few buffers."""
    return 4 * sum(size for sizes, _ in groups.values() for size in sizes.values())


def _bytes_of(local_groups: dict[str, dict[str, Tensor]]) -> int:
    return sum(tensor.nbytes for tensors in local_groups.values() for tensor in tensors.values())


def _free(folder: Path) -> int | None:
    """How many bytes are free on the disk of a folder, which need not be there yet; None where it does not tell."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return None
    return usage.free if usage.total else None


def _room_words(size: int, free: int | None) -> str:
    """How much a checkpoint takes, and how much is free."""
    room = "" if free is None else f", {free / 1e9:.3g} GB are free there"
    return f"it takes about {size / 1e9:.3g} GB{room}"


def _require_numbers(group: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for NaN or +inf in a tensor; -inf stands for "none yet", and in masks."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not bool(tensor.amax() < math.inf):
            raise UserError(f"{group} of {name} holds what is no finite number")


def _complete(aside: Path, target: Path, manifest: Manifest) -> str | None:
    """Describe what lies aside, then give it its name; what kept it from that, in words."""
    try:
        write_text(aside / MANIFEST, sealed_json(manifest.model_dump(mode="json")))
        for name, record in manifest.files.items():
            if (aside / name).stat().st_size != record.bytes:
                return f"{name} is not of the size that was written"
        flush_to_disk(aside)
        if target.exists():
            remove_checkpoint(target)
        aside.rename(target)
        flush_to_disk(target.parent)
    except OSError as error:
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
