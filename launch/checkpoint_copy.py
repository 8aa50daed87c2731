"""Copies of checkpoints, between folders and stores that fsspec knows: whole, or not there at all.

In a store, the manifest is written last: without it there is no checkpoint, as in a folder.
"""

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from data.shards.remote import READ_BYTES, filesystem
from data.shards.retry import TransferError, retried
from data.shards.store import RetryConfig, is_remote, list_remote, open_stream, read_bytes, write_remote
from vlm.aside import folder_aside
from vlm.atomic import flush_to_disk
from vlm.checkpoint.folder import MANIFEST, checkpoint_at, folder_name, step_of
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.manifest import FileRecord, Manifest, read_manifest
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.paths import local_path, output_folder

_RETRY = RetryConfig()


def copy_checkpoint(source: str, target: str, retry: RetryConfig = _RETRY) -> str:
    """Copy a checkpoint, or the newest complete one of a run, into the folder `target`; where it lies then.

    Every byte is compared with the manifest on its way; a copy that is there already is left as it is.

    Raises:
        UserError: there is none, it is damaged, another one lies there, or a store cannot be read or written.
    """
    if is_remote(source) and is_remote(target):
        raise UserError(f"copy: {source} and {target} are both in stores; one of them must be a folder of this machine")
    try:
        if is_remote(source):
            return str(_newest_fetched(source.rstrip("/"), output_folder(target, "copy"), retry))
        checkpoint = _local(source)
        if is_remote(target):
            return send(checkpoint, target.rstrip("/"), retry)
        return str(_copied(checkpoint, output_folder(target, "copy")))
    except OSError as error:
        raise UserError(f"copy: {error}") from None


def _local(source: str) -> Checkpoint:
    found = checkpoint_at(local_path(source, "copy"))
    if found is None:
        raise UserError(f"copy: {source} is neither a checkpoint nor a run with a complete one")
    checkpoint = Checkpoint(found)
    checkpoint.verify(World())
    return checkpoint


def _copied(checkpoint: Checkpoint, into: Path) -> Path:
    target = into / folder_name(checkpoint.manifest.step)
    if _is_there(target, (checkpoint.folder / MANIFEST).read_bytes()):
        return target
    with folder_aside(target) as aside:
        for name in (*checkpoint.manifest.files, MANIFEST):
            shutil.copyfile(checkpoint.folder / name, aside / name)
            flush_to_disk(aside / name)
    return target


def _is_there(target: Path, manifest: bytes) -> bool:
    """Whether this checkpoint lies in a folder. Raises UserError where another one does."""
    if not (target / MANIFEST).is_file():
        return False
    if (target / MANIFEST).read_bytes() != manifest:
        raise UserError(f"copy: {target} holds another checkpoint of this step; name another folder")
    return True


def send(checkpoint: Checkpoint, target: str, retry: RetryConfig = _RETRY) -> str:
    """Store a checkpoint that was verified below the URL `target`, the manifest last; its URL.

    Raises:
        OSError: the store cannot be written, in one line.
        UserError: the scheme is unknown, or the store holds another checkpoint of this step.
    """
    url = f"{target}/{folder_name(checkpoint.manifest.step)}"
    manifest = (checkpoint.folder / MANIFEST).read_bytes()
    with suppress(FileNotFoundError):
        if read_bytes(f"{url}/{MANIFEST}", retry) != manifest:
            raise UserError(f"copy: {url} holds another checkpoint of this step; name another place")
        return url
    for name in checkpoint.manifest.files:
        file = checkpoint.folder / name
        retried(f"{url}/{name}", retry, partial(_put, file, f"{url}/{name}", retry.silence), "written")
    write_remote(f"{url}/{MANIFEST}", manifest, retry)
    return url


def _put(file: Path, url: str, silence: float) -> None:
    store, path = filesystem(url, silence)
    store.makedirs(path.rpartition("/")[0], exist_ok=True)
    store.put_file(str(file), path)
    store.invalidate_cache()
    stored, size = store.info(path)["size"], file.stat().st_size
    if stored != size:
        raise TransferError(f"{stored} of {size} bytes arrived")


def _newest_fetched(source: str, into: Path, retry: RetryConfig) -> Path:
    url = newest_stored(source, retry)
    if url is None:
        raise UserError(f"copy: {source} is neither a checkpoint nor a run with a complete one")
    return fetch(url, into, retry)


def fetch(url: str, into: Path, retry: RetryConfig = _RETRY) -> Path:
    """Bring the checkpoint under a URL into a folder, every byte compared on its way; where it lies then.

    Raises:
        UserError: it is damaged, or lacks a file, or another one lies there.
        OSError: the store cannot be read, in one line.
    """
    content = read_bytes(f"{url}/{MANIFEST}", retry)
    manifest = _read(content, url)
    target = into / folder_name(manifest.step)
    if _is_there(target, content):
        return target
    with folder_aside(target) as aside:
        for name, record in manifest.files.items():
            with (aside / name).open("wb") as file:
                _require_whole(f"{url}/{name}", record, retry, file.write)
            flush_to_disk(aside / name)
        (aside / MANIFEST).write_bytes(content)
        flush_to_disk(aside / MANIFEST)
    return target


def newest_stored(source: str, retry: RetryConfig = _RETRY) -> str | None:
    """The URL of the checkpoint that a URL is, or of the newest complete one below it; None where there is none."""
    return next(iter(all_stored(source, retry)), None)


def all_stored(source: str, retry: RetryConfig = _RETRY) -> list[str]:
    """The URLs of the checkpoint that a URL is, or of the complete ones below it, the newest first."""
    with suppress(FileNotFoundError):
        read_bytes(f"{source}/{MANIFEST}", retry)
        return [source]
    for below in (source, f"{source}/checkpoints"):
        found = [one.removesuffix(f"/{MANIFEST}") for one in list_remote(f"{below}/step-*/{MANIFEST}", "copy", retry)]
        by_step = {step: one for one in found if (step := step_of(Path(one))) is not None}
        if by_step:
            return [by_step[step] for step in sorted(by_step, reverse=True)]
    return []


def _read(content: bytes, url: str) -> Manifest:
    with TemporaryDirectory(prefix="vlm-copy-") as folder:
        (Path(folder) / MANIFEST).write_bytes(content)
        try:
            return read_manifest(Path(folder))
        except UserError as error:
            raise type(error)(str(error).replace(folder, url)) from None


def verify_stored(url: str, retry: RetryConfig = _RETRY) -> Manifest:
    """The manifest of the checkpoint under a URL, each file of which was read and compared with it.

    Raises:
        UserError: it is damaged, or lacks a file.
        OSError: the store cannot be read, in one line.
    """
    manifest = _read(read_bytes(f"{url}/{MANIFEST}", retry), url)
    for name, record in manifest.files.items():
        _require_whole(f"{url}/{name}", record, retry, lambda _: None)
    return manifest


def _require_whole(url: str, record: FileRecord, retry: RetryConfig, take: Callable[[bytes], object]) -> None:
    """Read a stored file, hand it over piece by piece, and raise UserError where it is not as it was written."""
    digest = hashlib.sha256()
    try:
        with open_stream(url, retry) as stored:
            while piece := stored.read(READ_BYTES):
                take(piece)
                digest.update(piece)
    except FileNotFoundError:
        raise UserError(f"{url} is missing") from None
    if digest.hexdigest() != record.sha256:
        raise UserError(f"{url} is damaged (its bytes do not match the manifest's SHA-256)")
