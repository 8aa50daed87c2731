"""Numbered images to evaluate on, wherever they are stored: decoded once each, shared out evenly among the ranks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from data.images.pillow import Pixels
from data.loading.pixel_ring import PixelRing, Slot
from data.loading.workers import WorkerInfo, load_ahead
from data.samples.bad_sample import BadSampleError
from vlm.distributed.world import World
from vlm.skip import Skip

_PREFETCH = 2  # batches that each worker holds ready
_WORKERS, _WORTH_WORKERS = 2, 8  # processes, and the batches from which on starting them pays


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


class Views(NamedTuple):
    """Decoded rows on their way between processes."""

    images: UInt8[Tensor, "batch 3 height width"] | Slot
    indices: Int64[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    skipped: tuple[Skip, ...]

    def received(self, ring: PixelRing) -> "Views":
        """The same with its pixels, in the process that reads them."""
        return self._replace(images=ring.images(self.images))

    def pin_memory(self) -> "Views":
        """The same in memory that a GPU reads by itself."""
        assert isinstance(self.images, Tensor)
        return Views(self.images.pin_memory(), self.indices.pin_memory(), self.valid.pin_memory(), self.skipped)


class HeldOutImages(ABC):
    """The base of sets of numbered images; a subclass says where one lies and how it is read.

    `size` is the side of the views in pixels.
    """

    def __init__(self, size: int, skipped: Sequence[Skip] = ()) -> None:
        self._view_size = size
        self._skipped = {(skip.shard, skip.key): skip for skip in skipped}

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def stored_image(self, number: int) -> bytes:
        """The image file as stored (JPEG, PNG or WebP).

        Raises:
            OSError, BadSampleError: it cannot be read any more, or is another one now.
        """

    @abstractmethod
    def view(self, number: int) -> Pixels:
        """The pixels that a model sees, [size, size, 3]. Raises as `stored_image`, and for what is no whole image."""

    @abstractmethod
    def place_of(self, number: int) -> str:
        """Where an image is read from, for whoever waits for it."""

    @abstractmethod
    def skip(self, number: int, reason: str) -> Skip:
        """The record of an image being left out."""

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """What was unusable so far, each once, among what this rank has looked at."""
        return tuple(self._skipped.values())

    def batches(
        self, world: World, batch_size: int, workers: int | None = None, chosen: Sequence[int] | None = None
    ) -> Iterator[HeldOutBatch]:
        """This rank's contiguous share of all images, or of `chosen` ones, of which there is one at least.

        The batches are equally many and equally large on every rank, so that forwards that are collectives stay in
        step: rows beyond a rank's share are padding. `workers` processes load them; None: as many as training has by
        default, where the batches are worth it.
        """
        places = range(len(self)) if chosen is None else chosen
        share = places[world.rank * len(places) // world.size : (world.rank + 1) * len(places) // world.size]
        most = -(-len(places) // world.size)
        rows = min(batch_size, most)
        num_batches = -(-most // rows)
        if workers is None:
            workers = _WORKERS if num_batches >= _WORTH_WORKERS else 0
        ring = PixelRing.ahead(workers, _PREFETCH, rows, self._view_size)
        loaded = load_ahead(
            _ViewLoader(self, share, ring),
            range(num_batches),
            workers=workers,
            prefetch=_PREFETCH,
            arrive=lambda views: views.received(ring),
            pinned=world.device.type == "cuda",
        )
        for views in loaded:
            self._skipped.update({(skip.shard, skip.key): skip for skip in views.skipped})
            yield self._batch(views, ring.images(views.images))

    def _batch(self, views: Views, images: UInt8[Tensor, "batch 3 height width"]) -> HeldOutBatch:
        """The batch of these rows, in the process that asked for them."""
        return HeldOutBatch(images, views.indices, views.valid, None)


@dataclass(frozen=True)
class _ViewLoader:
    """Decodes batch number n of a rank's share, in this process or in one forked from it."""

    images: HeldOutImages
    share: Sequence[int]
    ring: PixelRing

    def __call__(self, number: int, worker: WorkerInfo) -> Views:
        sent, pixels = self.ring.room(worker.number)
        pixels[:] = 0  # what a batch before left there
        rows = len(pixels)
        valid = torch.zeros(rows, dtype=torch.bool)
        indices = torch.zeros(rows, dtype=torch.int64)
        skipped = []
        for row, position in enumerate(self.share[number * rows : (number + 1) * rows]):
            worker.set_status(self.images.place_of(position))
            indices[row] = position
            try:
                pixels[row] = self.images.view(position).transpose(2, 0, 1)
                valid[row] = True
            except (BadSampleError, OSError) as error:
                skipped.append(self.images.skip(position, str(error)))
        return Views(sent, indices, valid, tuple(skipped))
