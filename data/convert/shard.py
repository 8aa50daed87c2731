"""Writing one shard, and what is remembered of it."""

import io
import json
import math
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.convert.entry import Blob, Entry, TextFile
from data.convert.image import StoredImage, prepare_image
from data.convert.journal import FinishedShard
from data.samples.bad_sample import BadSampleError
from data.samples.captions import MOST_CAPTIONS, MOST_CHARACTERS, listed, readable
from data.samples.labels import class_number
from vlm.paths import kind_of


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: its number, its samples, and where relative image paths start."""

    number: int
    path: Path
    entries: tuple[Entry, ...]
    root: Path
    max_size: int | None
    quality: int | None


@dataclass(frozen=True)
class BadRow:
    """A row that was left out, and why."""

    row: int
    path: str
    reason: str


@dataclass(frozen=True)
class ShardResult(FinishedShard):
    """The outcome of one shard; `num_bytes` is 0 where no sample was usable, so that there is no file."""

    num_samples: int
    num_bytes: int
    bad: tuple[BadRow, ...]


def write_shard(job: ShardJob) -> ShardResult:
    """Write the shard aside, flush it and give it its name, which no half-written file ever has.

    Raises:
        OSError: the shard cannot be written.
    """
    bad: list[BadRow] = []
    aside = job.path.with_name(f".{job.path.name}.{os.getpid()}.partial")
    with aside.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for entry in job.entries:
                try:
                    members = sample_of(entry, job)
                except BadSampleError as error:
                    bad.append(BadRow(entry.row, entry.path, str(error)))
                    continue
                for suffix, content in members.items():
                    _add(tar, f"{entry.key}.{suffix}", content)
        file.flush()
        os.fsync(file.fileno())
    num_samples = len(job.entries) - len(bad)
    if num_samples:
        num_bytes = aside.stat().st_size
        aside.replace(job.path)
    else:
        num_bytes = 0
        aside.unlink()
        job.path.unlink(missing_ok=True)
    return ShardResult(job.number, num_samples, num_bytes, tuple(bad))


def sample_of(entry: Entry, job: ShardJob) -> dict[str, bytes]:
    """The members of one sample by suffix: the image, txt (the first caption, for readers of one), json, a label's cls.

    A sample with a label needs no caption.

    Raises:
        BadSampleError: the image, the captions or the label cannot be used.
    """
    if entry.problem is not None:
        raise BadSampleError(entry.problem)
    captions = _captions(entry)
    image = prepare_image(_read(entry.image, job.root), job.max_size, job.quality)
    try:
        described = json.dumps(_described(entry, captions, image), ensure_ascii=False, default=str)
    except ValueError as error:
        raise BadSampleError(f"its columns cannot be written as JSON ({error})") from error
    members = {image.suffix: image.data}
    if captions:
        members["txt"] = captions[0].encode()
    members["json"] = described.encode("utf-8", "replace")
    if entry.label is not None:
        members["cls"] = str(class_number(entry.label)).encode()
    return members


def _described(entry: Entry, captions: list[str], image: StoredImage) -> dict[str, Any]:
    """The json member: captions, file name and size, then the other columns, which never overwrite these."""
    written: dict[str, Any] = {"captions": captions} if captions else {}
    written["file_name"] = entry.path
    written |= {"width": image.size[0], "height": image.size[1]}
    if image.size != image.original_size:
        written |= {"original_width": image.original_size[0], "original_height": image.original_size[1]}
    described = dict(written)
    for name, value in entry.fields.items():
        if name not in written:
            described[name] = _finite(value)
        elif value != written.get(f"original_{name}", written[name]):
            described[f"table_{name}"] = _finite(value)
    return described


def _captions(entry: Entry) -> list[str]:
    texts: list[str] = []
    for caption in entry.captions:
        if isinstance(caption, TextFile):
            texts.extend(map(readable, _lines(caption)))
        else:
            texts.extend(listed(caption))
    captions = [caption for caption in map(str.strip, texts) if caption]
    if not captions and entry.label is None:
        raise BadSampleError("it has no caption, or only empty ones")
    return captions


def _lines(file: TextFile) -> list[str]:
    try:
        with Path(file.path).open(encoding="utf-8-sig") as lines:
            return lines.read(MOST_CHARACTERS * MOST_CAPTIONS).split("\n")  # splitlines() would split at more than that
    except UnicodeDecodeError as error:
        raise BadSampleError(f"its captions in {file.path} are not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise BadSampleError(f"its captions in {file.path} cannot be read ({error.strerror or error})") from error


def _read(image: Any, root: Path) -> bytes:
    if image is None or image == "":
        raise BadSampleError("it names no image")
    if not isinstance(image, str | Blob):
        raise BadSampleError(f"its image is no path but {image!r:.40}")
    path = Path(image.file) if isinstance(image, Blob) else root / os.path.expanduser(image)
    try:
        if path.exists() and not path.is_file():  # reading a FIFO would never end
            raise BadSampleError(f"its image is {kind_of(path)}, not a file")
        with path.open("rb") as file:
            if isinstance(image, Blob):
                file.seek(image.offset)
            return file.read(image.size if isinstance(image, Blob) else -1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte within the path
        why = error.strerror if isinstance(error, OSError) else None
        raise BadSampleError(f"its image cannot be read ({why or error})") from error


def _finite(value: Any) -> Any:
    """The value without NaN and infinities, for which JSON has no word."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member with neither time nor owner, so that the same samples make the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o444
    tar.addfile(member, io.BytesIO(content))
