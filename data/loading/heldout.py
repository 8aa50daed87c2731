"""Held-out shards: every sample once, in stored order, shared out evenly among the ranks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from data.images.views import evaluation_view
from data.loading.pixel_ring import PixelRing, Slot
from data.loading.workers import WorkerInfo, load_ahead
from data.samples.bad_sample import BadSampleError
from data.samples.captions import TXT, CaptionConfig, CaptionsByField, TxtLayout, captions_by_field
from data.samples.txt_layout import detect_layout
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.reader import ShardReader
from data.shards.source import Sample, Source, open_source
from data.shards.tar import shown_name
from vlm.batch import Skip
from vlm.checkpoint.data_record import DataRecord
from vlm.distributed.world import World
from vlm.model.image_spec import ImageSpec

Value = TypeVar("Value")
_PREFETCH = 2  # batches that each worker holds ready


@dataclass(frozen=True)
class HeldOutBatch:
    """Some rows of a held-out set; padding and broken samples are not `valid` and count for nothing.

    `indices` are positions in the set (0 where a row is padding); `labels` is None when the set has none.
    """

    images: UInt8[Tensor, "batch 3 height width"]
    indices: Int64[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    labels: Int64[Tensor, " batch"] | None

    def to(self, device: torch.device) -> "HeldOutBatch":
        """The same rows on `device`; copies from pinned memory run asynchronously."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            indices=self.indices.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
        )


class HeldOutSet:
    """The samples of held-out shards, numbered as stored; the first `limit` of them when one is given.

    Captions, labels and fields are read without decoding images. `cache` keeps
    copies of remote and gzipped shards, `where` is the key that messages blame. `txt` says whether a txt member is one
    caption or one a line; by default it is one a line where the set is laid out as public benchmarks are.

    Raises:
        UserError: a pattern matches nothing, or no file of it holds an image.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        image: ImageSpec,
        *,
        root: str | None = None,
        limit: int | None = None,
        cache: ShardCache | None = None,
        where: str = "shards",
        txt: TxtLayout | None = None,
    ) -> None:
        patterns = (shards,) if isinstance(shards, str) else tuple(shards)
        reach = cache or ShardCache()
        self._source = open_source(",".join(patterns), patterns, FolderIndex(reach, where), root=root)
        self._where = where
        self._image = image
        self._txt = txt
        self._read_captions: dict[TxtLayout, tuple[CaptionsByField, ...]] = {}
        self._reader = ShardReader(reach)
        self._size = self._source.num_samples if limit is None else min(limit, self._source.num_samples)
        self._skipped = {(skip.shard, skip.key): skip for skip in self._source.problems(reach)}

    def __len__(self) -> int:
        return self._size

    @property
    def record(self) -> DataRecord:
        """The identity of the set for checkpoints, wherever it lies."""
        return DataRecord(samples=len(self), shards=len(self._source.shards), content=self._source.content)

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """Samples that were unusable so far, each once: in the index, in texts read, in images this rank decoded."""
        return tuple(self._skipped.values())

    @cached_property
    def captions(self) -> tuple[tuple[str, ...], ...]:
        """All captions of each sample; none for a sample whose captions are missing or broken."""
        captions_by_sample = self._captions_as("lines" if self.txt_layout == "lines" else "whole")
        return tuple(
            tuple(caption for texts in captions.values() for caption in texts) for captions in captions_by_sample
        )

    @cached_property
    def txt_layout(self) -> TxtLayout | Literal["mixed"]:
        """Whether txt members are captions or hold one a line; "mixed" where most have several lines, not all."""
        if self._txt is not None:
            return self._txt
        return detect_layout(self._source.shards, self._captions_as("whole"))

    def _captions_as(self, layout: TxtLayout) -> tuple[CaptionsByField, ...]:
        if layout not in self._read_captions:
            config = CaptionConfig(txt=layout)
            self._read_captions[layout] = tuple(
                self._or_skip(number, ("txt", "json"), partial(_captions, config=config), {})
                for number in range(len(self))
            )
        return self._read_captions[layout]

    @cached_property
    def labels(self) -> Int64[Tensor, " samples"] | None:
        """The class of each sample, None when no sample has one; else those without a readable one are not `valid`."""
        if all(label is None for label in self._read_labels):
            return None
        for number in (number for number, label in enumerate(self._read_labels) if label is None):
            self._skip(number, "it has no cls, unlike others of the set")
        return torch.tensor([label or 0 for label in self._read_labels], dtype=torch.int64)

    @cached_property
    def _read_labels(self) -> list[int | None]:
        if not self._source.has_labels:
            return [None] * len(self)
        return [self._or_skip(number, ("cls",), lambda sample: sample.label, None) for number in range(len(self))]

    def without(self, what: str, places: str) -> str:
        """A line on no sample having `what`, which is looked for in `places`, and on what was there instead."""
        shards = self._source.shards
        more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
        first = next(iter(self.skipped), None)
        instead = "" if first is None else f"; {shown_name(first.key) or first.shard}: {first.reason}"
        return f"{self._where}: no sample of {shards[0]}{more} has a {what} ({places}){instead}"

    def keys(self) -> tuple[str, ...]:
        """The key of each sample."""
        return tuple(self._key(number) for number in range(len(self)))

    def fields(self, number: int) -> dict[str, Any]:
        """Everything that the sample's json holds; empty when it has none, or a broken one."""
        return self._or_skip(number, ("json",), lambda sample: sample.fields, {})

    def stored_image(self, number: int) -> bytes:
        """The sample's image file as stored (JPEG, PNG or WebP).

        Raises:
            OSError, BadSampleError: the shard cannot be read any more, or holds other samples now.
        """
        return self._source.read(*self._source.place(number), self._reader, ("image",)).image

    def batches(self, world: World, batch_size: int, workers: int = 0) -> Iterator[HeldOutBatch]:
        """This rank's contiguous share, in batches that are equally many and equally large on every rank.

        So forwards that are collectives stay in step: rows beyond a rank's share are padding.
        """
        rank_positions = range(world.rank * len(self) // world.size, (world.rank + 1) * len(self) // world.size)
        most = -(-len(self) // world.size)
        rows = min(batch_size, most)
        ring = PixelRing.ahead(workers, _PREFETCH, rows, self._image.size)
        loaded = load_ahead(
            _ViewLoader(self._source, self._reader, self._image, rank_positions, ring),
            range(-(-most // rows)),
            workers=workers,
            prefetch=_PREFETCH,
            arrive=lambda views: views.received(ring),
            pinned=world.device.type == "cuda",
        )
        for views in loaded:
            self._skipped.update({(skip.shard, skip.key): skip for skip in views.skipped})
            yield self._with_labels(views, ring.images(views.images))

    def _with_labels(self, views: "_Views", images: UInt8[Tensor, "batch 3 height width"]) -> HeldOutBatch:
        if self.labels is None:
            return HeldOutBatch(images, views.indices, views.valid, None)
        labelled = torch.tensor([self._read_labels[index] is not None for index in views.indices.tolist()])
        return HeldOutBatch(images, views.indices, views.valid & labelled, self.labels[views.indices])

    def _or_skip(self, number: int, parts: Sequence[str], read: Callable[[Sample], Value], otherwise: Value) -> Value:
        try:
            return read(self._source.read(*self._source.place(number), self._reader, parts))
        except (BadSampleError, OSError) as error:
            self._skip(number, str(error))
            return otherwise

    def skip(self, number: int, reason: str) -> Skip:
        """The record of a sample being left out."""
        return self._source.skip(self._source.place(number)[0], self._key(number), reason)

    def _skip(self, number: int, reason: str) -> None:
        skip = self.skip(number, reason)
        self._skipped.setdefault((skip.shard, skip.key), skip)

    def _key(self, number: int) -> str:
        return self._source.key_or_row(*self._source.place(number), self._reader)


def _captions(sample: Sample, config: CaptionConfig) -> CaptionsByField:
    return captions_by_field(sample.parts.get(TXT), sample.fields, config)


class _Views(NamedTuple):
    """Decoded rows on their way between processes."""

    images: UInt8[Tensor, "batch 3 height width"] | Slot
    indices: Int64[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    skipped: tuple[Skip, ...]

    def received(self, ring: PixelRing) -> "_Views":
        """The same with its pixels, in the process that reads them."""
        return self._replace(images=ring.images(self.images))

    def pin_memory(self) -> "_Views":
        """The same in memory that a GPU reads by itself."""
        assert isinstance(self.images, Tensor)
        return _Views(self.images.pin_memory(), self.indices.pin_memory(), self.valid.pin_memory(), self.skipped)


@dataclass(frozen=True)
class _ViewLoader:
    """Decodes batch number n of a rank's share, in this process or in one forked from it."""

    source: Source
    reader: ShardReader
    image: ImageSpec
    rank_positions: range
    ring: PixelRing

    def __call__(self, number: int, worker: WorkerInfo) -> _Views:
        images, pixels = self.ring.room(worker.number)
        pixels[:] = 0  # what a batch before left there
        rows = len(pixels)
        positions = self.rank_positions[number * rows : (number + 1) * rows]
        valid = torch.zeros(rows, dtype=torch.bool)
        indices = torch.zeros(rows, dtype=torch.int64)
        skipped = []
        for row, position in enumerate(positions):
            shard, place = self.source.place(position)
            worker.set_status(self.source.shards[shard])
            indices[row] = position
            try:
                sample = self.source.read(shard, place, self.reader, ("image",))
                pixels[row] = evaluation_view(sample.image, self.image).transpose(2, 0, 1)
                valid[row] = True
            except (BadSampleError, OSError) as error:
                skipped.append(self.source.skip(shard, self.source.key_or_row(shard, place, self.reader), str(error)))
        return _Views(images, indices, valid, tuple(skipped))
