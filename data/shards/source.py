"""One source: its shards, how many samples each holds, and the sample in any place of them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.randomness import hash_key
from data.samples.bad_sample import BadSampleError
from data.samples.captions import TXT, CaptionConfig, read_fields
from data.samples.labels import class_number
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.indexing import Indexer
from data.shards.manifest import ShardEntry
from data.shards.patterns import expand_shards
from data.shards.reader import ShardReader
from data.shards.sidecar import PARTS, ShardIndex
from data.shards.stamp import Stamp
from data.shards.statistics import ShardStatistics
from data.shards.store import is_remote
from data.shards.tar import IMAGE_SUFFIXES, NO_IMAGE, Problem, shown_name
from vlm.checkpoint.data_record import runs_of_shards
from vlm.errors import UserError
from vlm.progress import report_progress
from vlm.skip import Skip


@dataclass(frozen=True)
class Sample:
    """One sample as it was read: where it is stored, its key and stable id, and the bytes of its parts."""

    source: str
    shard: str
    key: str
    id: int
    parts: dict[str, bytes]

    @property
    def image(self) -> bytes:
        """The stored image file. Raises BadSampleError where there is none, as in a document."""
        if "image" not in self.parts:
            raise BadSampleError("it has no image")
        return self.parts["image"]

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Everything that its json member holds. Raises BadSampleError where that is no JSON object."""
        return read_fields(self.parts.get("json"))

    @property
    def label(self) -> int | None:
        """The class in its cls member; None when it has none.

        Raises:
            BadSampleError: the member is no whole number from 0 to 2^63 - 1.
        """
        stored = self.parts.get("cls")
        return None if stored is None else class_number(stored, "cls")


class ShardContent(NamedTuple):
    """The content of a shard: its name in its source, samples with an image, used ones without; a hash of either."""

    name: str
    samples: int
    content: str
    texts_alone: int = 0
    content_of_texts_alone: str = ""


class Source:
    """The samples of one source by shard and row, without the shards being open.

    Those without an image are problems. Where no images are needed (`images`), they come last in each shard.
    """

    def __init__(self, name: str, entries: dict[str, ShardEntry], index: FolderIndex, *, images: bool = True) -> None:
        self.name = name
        self._entries = entries
        self._index = index
        self._imageless = {} if images else {name: entry.imageless or 0 for name, entry in entries.items()}
        self.shards = tuple(entries)
        counts = (entry.samples + self._imageless.get(name, 0) for name, entry in entries.items())
        self.counts = np.fromiter(counts, np.int64, len(entries))
        self.num_samples = int(self.counts.sum())
        self.labelled = all(entry.labelled == entry.samples for entry in entries.values())
        self.labelled &= not any(self._imageless.values())
        self.has_labels = any(entry.labelled for entry in entries.values())
        self.mean_bytes = sum(entry.bytes or 0 for entry in entries.values()) / len(entries)
        self.stable_names = stable_names(self.shards)

    def stamp(self, shard: int) -> Stamp:
        """The state in which a shard was indexed."""
        entry = self._entries[self.shards[shard]]
        return Stamp(entry.bytes, entry.version)

    def read(self, shard: int, row: int, reader: ShardReader, parts: Sequence[str] = PARTS) -> Sample:
        """One sample with those of its `parts` that it has.

        Raises:
            OSError: its shard is gone, unreadable or shorter than indexed.
            BadSampleError: its shard holds other samples now.
        """
        name, stamp = self.shards[shard], self.stamp(shard)
        stored = reader.read(name, stamp, row, parts)
        return Sample(self.name, name, self.key(shard, row, reader), self.id(shard, row, reader), stored)

    def key(self, shard: int, row: int, reader: ShardReader) -> str:
        """The key of a sample. Raises as `read`."""
        return reader.index(self.shards[shard], self.stamp(shard), row).key(row)

    def key_or_row(self, shard: int, row: int, reader: ShardReader) -> str:
        """The key of a sample for messages: "#" and its row where its shard cannot be opened."""
        try:
            return self.key(shard, row, reader)
        except (OSError, BadSampleError):
            return f"#{row}"

    def id(self, shard: int, row: int, reader: ShardReader) -> int:
        """The stable 64-bit name of a sample: of its source, its shard's name in the source, and its key."""
        key_id = reader.index(self.shards[shard], self.stamp(shard), row).ids[row]
        return sample_id(self.name, self.stable_names[shard], int(key_id))

    @cached_property
    def contents(self) -> tuple[ShardContent, ...]:
        """The content of each shard; a hash is empty where its index does not know it."""
        contents = []
        for name, (shard, entry) in zip(self.stable_names, self._entries.items(), strict=True):
            alone = self._imageless.get(shard, 0)
            of_texts = (alone, entry.imageless_content) if alone else ()
            contents.append(ShardContent(name, entry.samples, entry.content, *of_texts))
        return tuple(contents)

    @cached_property
    def content(self) -> tuple[str, ...]:
        """A hash of the names of shards in the source, and of what is in them, for each run of `runs_of_shards`.

        It does not depend on where the data lies. Empty where the index of a shard does not know its content.
        """
        entries = list(self._entries.values())
        if not all(entry.content for entry in entries):
            return ()
        lines = [f"{name}\n{one.samples} {one.content}\n" for name, one in zip(self.stable_names, entries, strict=True)]
        for number, shard in enumerate(self.shards):
            if self._imageless.get(shard):
                lines[number] += f"{entries[number].imageless} {entries[number].imageless_content}\n"
        texts = ("".join(lines[run.start : run.stop]) for run in runs_of_shards(len(lines)))
        return tuple(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest() for text in texts)

    def skip(self, shard: int, key: str, reason: str, substitute: str = "") -> Skip:
        """The record of a sample being left out."""
        return Skip(self.name, self.shards[shard], key, reason, substitute)

    @cached_property
    def statistics(self) -> ShardStatistics:
        """Statistics of the texts of the source."""
        return self._index.statistics(self.shards)

    def has_captions(self, policy: CaptionConfig) -> bool:
        """Whether any sample has text where the policy looks for it."""
        if policy.fields is None and any(entry.captions for entry in self._entries.values()):
            return True
        if not self.statistics.fields.keys().isdisjoint(policy.places):
            return True
        texts_alone = (index.header.imageless for index in self._indexes_of_imageless())
        return any(one is not None and not one.fields.keys().isdisjoint(policy.places) for one in texts_alone)

    @cached_property
    def fields(self) -> frozenset[str]:
        """The names under which samples have texts: "txt", or fields of their json."""
        texts_alone = (index.header.imageless for index in self._indexes_of_imageless())
        return frozenset(self.statistics.fields).union(*(one.fields for one in texts_alone if one is not None))

    def _indexes_of_imageless(self) -> Iterator[ShardIndex]:
        """The index of each shard whose samples of texts alone are used."""
        indexer = Indexer(self._index.cache, self._index.where)
        return (indexer(name) for name, count in self._imageless.items() if count)

    def problems(self, cache: ShardCache) -> tuple[Skip, ...]:
        """Everything unusable that indexing came upon: cut shards, samples without an image where one is needed."""
        indexer = Indexer(cache, self.name)
        skips = []
        for name, entry in self._entries.items():
            if not entry.problems:
                continue
            try:
                index = indexer.find(name, Stamp(entry.bytes, entry.version))
                index = indexer(name) if index is None else index
                problems = _without(index) if self._imageless else index.header.problems
            except UserError as error:
                problems = (Problem("", f"of {entry.problems:,} things that cannot be used nothing is known: {error}"),)
            skips += [Skip(self.name, name, problem.key, problem.reason, "") for problem in problems]
        return tuple(skips)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """The end of each shard when samples are numbered through."""
        return np.cumsum(self.counts)

    def place(self, number: int) -> tuple[int, int]:
        """The shard and row of a sample numbered through the shards as listed."""
        if not 0 <= number < self.num_samples:
            raise IndexError(number)
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, number - int(self.ends[shard]) + int(self.counts[shard])


def sample_id(source: str, shard: str, key_id: int) -> int:
    """The hash of a key, salted with its source and its shard's name in the source."""
    salt = hash_key("sample", source, shard)
    return int.from_bytes(
        blake2b(key_id.to_bytes(8, "little", signed=True), key=salt, digest_size=8).digest(), "little", signed=True
    )


def stable_names(shards: Sequence[str]) -> tuple[str, ...]:
    """The shards' names below the folder that they have in common: they survive a move of the data."""
    if len(shards) == 1:
        return (shards[0][shards[0].rfind("/") + 1 :],)
    names = [shard if is_remote(shard) else os.path.abspath(shard) for shard in shards]
    first, last = min(names), max(names)
    shared = next((place for place in range(len(first)) if first[place : place + 1] != last[place : place + 1]), 0)
    start = first.rfind("/", 0, shared) + 1
    return tuple(name[start:] for name in names)


def open_source(
    name: str,
    patterns: Sequence[str],
    index: FolderIndex,
    *,
    root: str | None = None,
    images: bool = True,
    documents: bool = False,
) -> Source:
    """The source whose shards `patterns` name; what no index covers yet is indexed.

    To earlier versions texts alone and documents were samples without an image, which their indexes do not list: where
    these are wanted (no `images`, or `documents`), such shards are indexed anew.

    Raises:
        UserError: a pattern matches nothing, a shard cannot be read, or no shard holds an image (a text, where no
            `images` are needed).
    """
    shards = expand_shards(patterns, root, index.where)
    progress = partial(report_progress, f"indexing {index.where}")
    entries = index.load_or_build(shards, progress=progress)
    if not images or documents:
        unknown = [name for name, entry in entries.items() if entry.imageless is None and entry.problems]
        entries |= index.load_or_build(unknown, fresh=True, progress=progress) if unknown else {}
    source = Source(name, entries, index, images=images)
    if not source.num_samples:
        what = f"image ({', '.join(IMAGE_SUFFIXES)})" if images else "text (txt, json)"
        more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
        hint = next((_hint(problem) for problem in source.problems(index.cache)), "")
        raise UserError(f"{index.where}: no {what} in {shards[0]}{more}{hint}")
    return source


def require_documents(source: Source, where: str) -> None:
    """Refuse a source without any document. Raises UserError, which begins with `where`."""
    if not source.statistics.documents:
        more = f" and {len(source.shards) - 1} more" if len(source.shards) > 1 else ""
        raise UserError(
            f"{where}: no document in {source.shards[0]}{more}: one has a json member, and images KEY.0.jpg, KEY.1.png"
        )


def _without(index: ShardIndex) -> tuple[Problem, ...]:
    """The problems of a shard but for samples without an image that are used all the same."""
    used = {index.key(row) for row in range(index.num_with_image, len(index))}
    return tuple(one for one in index.header.problems if not (one.key in used and one.reason.startswith(NO_IMAGE)))


def _hint(problem: Skip) -> str:
    return f": {shown_name(problem.key)}: {problem.reason}" if problem.key else f": {problem.reason}"


def require_captions(source: Source, policy: CaptionConfig, where: str) -> None:
    """Refuse a source none of whose samples has a caption; single missing captions are left to the stream.

    Raises:
        UserError: naming the source, its first shard and the fields found instead.
    """
    policy_fields = policy.places
    if source.has_captions(policy):
        return
    stored_fields = source.fields
    more = f" and {len(source.shards) - 1} more" if len(source.shards) > 1 else ""
    expected = ", ".join(name if name == TXT else f"json:{name}" for name in policy_fields)
    shown = ", ".join(sorted(name if name == TXT else f"json:{name}" for name in stored_fields))
    raise UserError(
        f"{where}: no caption field in {source.shards[0]}{more}: expected {expected}; found {shown or 'no texts'}"
    )
