"""The images that a benchmark's entries name: in a folder, or in shards."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data.images.crop import Box
from data.loading.held_out_images import HeldOutImages
from data.loading.heldout import HeldOutSet
from data.loading.image_files import ImageFile, ImageFiles
from data.shards.tar import IMAGE_SUFFIXES
from vlm.checkpoint.data_record import DataRecord
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec
from vlm.paths import below, shown

_AMBIGUOUS = -1
_OURS = re.compile(r"[0-9]{4,6}|[0-9a-f]{16}")  # names by place and by hash


class Pictures(ABC):
    """Images by name."""

    @abstractmethod
    def find(self, names: Sequence[str], where: str, box: Box | None = None) -> int | None:
        """The number of the image that has one of these names, the first that is there; None where none is.

        Raises:
            UserError: it begins with `where`; a name leads out of the folder, or a part of an image is meant that
                cannot be had.
        """

    @abstractmethod
    def images(self) -> HeldOutImages:
        """All that were found."""

    @property
    @abstractmethod
    def records(self) -> dict[str, DataRecord]:
        """Their identity, by the configuration's key."""

    @property
    @abstractmethod
    def words(self) -> str:
        """Where they are looked for."""


class FolderPictures(Pictures):
    """Files of a folder; a name may be without its suffix (jpg, jpeg, png, webp), or be a path below the folder."""

    def __init__(self, folder: Path, image: ImageSpec, source: str) -> None:
        self._folder = folder
        self._image = image
        self._source = source
        self._numbers: dict[ImageFile, int] = {}
        self._found: dict[str, Path | None] = {}

    def find(self, names: Sequence[str], where: str, box: Box | None = None) -> int | None:  # noqa: D102
        path = next((path for name in names if (path := self._file(name, where)) is not None), None)
        return None if path is None else self._numbers.setdefault(ImageFile(path, box), len(self._numbers))

    def _file(self, name: str, where: str) -> Path | None:
        if name not in self._found:
            suffixed = name.lower().endswith(tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES))
            tries = [name] if suffixed else [name, *(f"{name}.{suffix}" for suffix in IMAGE_SUFFIXES)]
            paths = (below(self._folder, one, where) for one in tries if not os.path.isdir(self._folder / one))
            self._found[name] = next((path for path in paths if os.path.isfile(path)), None)
        return self._found[name]

    def images(self) -> ImageFiles:  # noqa: D102
        return ImageFiles(list(self._numbers), self._image, self._source)

    @property
    def records(self) -> dict[str, DataRecord]:  # noqa: D102
        digest = blake2b(digest_size=8)
        for path, box in self._numbers:
            name, size = os.path.relpath(path, self._folder), os.path.getsize(path) if os.path.isfile(path) else None
            digest.update(f"{name}\0{size} {box}\n".encode("utf-8", "surrogateescape"))
        return {"images": DataRecord(samples=len(self._numbers), shards=1, content=(digest.hexdigest(),))}

    @property
    def words(self) -> str:  # noqa: D102
        return str(self._folder)


class ShardPictures(Pictures):
    """Samples of shards, by their key or the `source_name` in their json, each with its suffix or without."""

    def __init__(self, held_out: HeldOutSet) -> None:
        self._held_out = held_out
        self._numbers: dict[str, int] = {}
        for number, key in enumerate(held_out.keys()):
            source_name = held_out.fields(number).get("source_name")
            names = (key, source_name) if isinstance(source_name, str) else (key,)
            for name in {_stem(name) for name in names}:
                self._numbers[name] = number if name not in self._numbers else _AMBIGUOUS

    def find(self, names: Sequence[str], where: str, box: Box | None = None) -> int | None:  # noqa: D102
        numbers = (self._numbers.get(_stem(name), _AMBIGUOUS) for name in names)
        found = next((number for number in numbers if number != _AMBIGUOUS), None)
        if found is not None and box is not None:
            raise UserError(f"{where} means a part of an image, which cannot be had of shards: name a folder of images")
        return found

    def images(self) -> HeldOutSet:  # noqa: D102
        return self._held_out

    @property
    def records(self) -> dict[str, DataRecord]:  # noqa: D102
        return {"shards": self._held_out.record}

    @property
    def words(self) -> str:  # noqa: D102
        return "these shards"


def _stem(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix[1:].lower() in IMAGE_SUFFIXES else name


def names_of_urls(urls: Sequence[str | None]) -> list[tuple[str, ...]]:
    """The names under which an image may lie that a list gives by address.

    They are its place in the list from 0, in four digits; the first 16 hex digits of the SHA-256 of the address; and
    its file name there, where no other address ends in it.
    """
    ends = [None if url is None else _file_name(url) for url in urls]
    owners: dict[str, set[str]] = {}
    for url, end in zip(urls, ends, strict=True):
        if url is not None and end is not None:
            owners.setdefault(_stem(end), set()).add(url)
    names = []
    for place, (url, end) in enumerate(zip(urls, ends, strict=True)):
        own = [f"{place:04d}"]
        if url is not None:
            own.append(hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16])
        if end is not None and len(owners[_stem(end)]) == 1:
            own.append(end)
        names.append(tuple(own))
    return names


def _file_name(url: str) -> str | None:
    """The last part of an address's path, where a file can have that name."""
    try:
        name = unquote(urlsplit(url).path).rpartition("/")[2]
    except ValueError:
        return None
    usable = name.isprintable() and not name.startswith(".") and 0 < len(name.encode("utf-8", "replace")) <= 250
    return name if usable and not _OURS.fullmatch(_stem(name)) else None


def missing_words(pictures: Pictures, num_missing: int, num_entries: int, first: Sequence[str]) -> str:
    """A line's words on entries whose image is not there."""
    names = " or ".join(map(shown, first))
    return f"{num_missing:,} of {num_entries:,} entries have no image in {pictures.words} (first: {names})"
