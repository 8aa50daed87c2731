"""Held-out shards: every sample once, in stored order, shared out evenly among the ranks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from data.bad_sample import BadSampleError
from data.images.decode import Pixels, evaluation_view, stack_pixels
from data.shards.index import Sample, SourceIndex, index_source
from data.shards.tar import ShardReader
from data.workers import load_ahead
from vlm.batch import Skip
from vlm.model.image_spec import ImageSpec
from vlm.world import World

Value = TypeVar("Value")


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

    Captions, labels and fields are read without decoding images. `cache` is the folder for unpacked .tar.gz shards,
    `where` the key that messages blame.

    Raises:
        UserError: a pattern matches nothing, or a file is no tar.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        image: ImageSpec,
        *,
        root: str | None = None,
        limit: int | None = None,
        cache: str | None = None,
        where: str = "shards",
    ) -> None:
        patterns = (shards,) if isinstance(shards, str) else tuple(shards)
        self._index = index_source(",".join(patterns), patterns, root=root, cache=cache, where=where)
        self._image = image
        self._reader = ShardReader()
        self._size = len(self._index) if limit is None else min(limit, len(self._index))
        self._skipped = {(skip.shard, skip.key): skip for skip in self._index.problems}

    def __len__(self) -> int:
        return self._size

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """What was unusable so far, each sample once: in the index, in texts read, in images this rank decoded."""
        return tuple(self._skipped.values())

    @cached_property
    def captions(self) -> tuple[tuple[str, ...], ...]:
        """All captions of each sample; none for a sample whose captions are missing or broken."""
        return tuple(
            self._or_skip(number, lambda sample: sample.captions(self._reader), ()) for number in range(len(self))
        )

    @cached_property
    def labels(self) -> Int64[Tensor, " samples"] | None:
        """The class of each sample, None when no sample has one; else those without a readable one are not `valid`."""
        if all(label is None for label in self._read_labels):
            return None
        for sample in (self._index[number] for number, label in enumerate(self._read_labels) if label is None):
            lacking = sample.skip("it has no cls, unlike others of the set")
            self._skipped.setdefault((lacking.shard, lacking.key), lacking)
        return torch.tensor([label or 0 for label in self._read_labels], dtype=torch.int64)

    @cached_property
    def _read_labels(self) -> list[int | None]:
        return [self._or_skip(number, lambda sample: sample.label(self._reader), None) for number in range(len(self))]

    def keys(self) -> tuple[str, ...]:
        """The key of each sample."""
        return tuple(self._index[number].key for number in range(len(self)))

    def fields(self, number: int) -> dict[str, Any]:
        """Everything that the sample's json holds; empty when it has none, or a broken one."""
        return self._or_skip(number, lambda sample: sample.fields(self._reader), {})

    def stored_image(self, number: int) -> bytes:
        """The sample's image file as stored (JPEG, PNG or WebP).

        Raises:
            OSError: the shard cannot be read any more.
        """
        return self._index[number].image(self._reader)

    def batches(self, world: World, batch_size: int, workers: int = 0) -> Iterator[HeldOutBatch]:
        """This rank's contiguous share, in batches that are equally many and equally large on every rank.

        So forwards that are collectives stay in step: rows beyond a rank's share are padding.
        """
        share = range(world.rank * len(self) // world.size, (world.rank + 1) * len(self) // world.size)
        most = -(-len(self) // world.size)
        rows = min(batch_size, most)
        load = _ViewLoader(self._index, self._reader, self._image, share, rows)
        pinned = world.device.type == "cuda"
        for views in load_ahead(load, range(-(-most // rows)), workers=workers, pinned=pinned):
            self._skipped.update({(skip.shard, skip.key): skip for skip in views.skipped})
            yield self._with_labels(views)

    def _with_labels(self, views: "_Views") -> HeldOutBatch:
        if self.labels is None:
            return HeldOutBatch(views.images, views.indices, views.valid, None)
        labelled = torch.tensor([self._read_labels[index] is not None for index in views.indices.tolist()])
        return HeldOutBatch(views.images, views.indices, views.valid & labelled, self.labels[views.indices])

    def _or_skip(self, number: int, read: Callable[[Sample], Value], otherwise: Value) -> Value:
        sample = self._index[number]
        try:
            return read(sample)
        except (BadSampleError, OSError) as error:
            self._skipped[str(sample.shard), sample.key] = sample.skip(str(error))
            return otherwise


class _Views(NamedTuple):
    """Decoded rows on their way between processes."""

    images: UInt8[Tensor, "batch 3 height width"]
    indices: Int64[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    skipped: tuple[Skip, ...]


@dataclass(frozen=True)
class _ViewLoader:
    """Decodes batch number n of a rank's share; picklable, so that workers can."""

    index: SourceIndex
    reader: ShardReader
    image: ImageSpec
    share: range
    rows: int

    def __call__(self, number: int) -> _Views:
        mine = self.share[number * self.rows : (number + 1) * self.rows]
        blank: Pixels = np.zeros((self.image.size, self.image.size, 3), dtype=np.uint8)
        pixels = [blank] * self.rows
        valid = torch.zeros(self.rows, dtype=torch.bool)
        indices = torch.zeros(self.rows, dtype=torch.int64)
        skipped = []
        for row, position in enumerate(mine):
            sample = self.index[position]
            indices[row] = position
            try:
                pixels[row] = evaluation_view(sample.image(self.reader), self.image)
                valid[row] = True
            except (BadSampleError, OSError) as error:
                skipped.append(sample.skip(str(error)))
        return _Views(stack_pixels(pixels), indices, valid, tuple(skipped))
