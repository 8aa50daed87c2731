"""Held-out shards: every sample once, in stored order, shared out evenly among the ranks."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from data.images.pillow import Pixels
from data.images.views import evaluation_view
from data.loading.held_out_images import HeldOutBatch, HeldOutImages, Views
from data.samples.bad_sample import BadSampleError
from data.samples.captions import TXT, CaptionConfig, CaptionsByField, TxtLayout, captions_by_field
from data.samples.txt_layout import detect_layout
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.reader import ShardReader
from data.shards.source import Sample, open_source
from data.shards.tar import shown_name
from vlm.checkpoint.data_record import DataRecord
from vlm.model.image_spec import ImageSpec
from vlm.skip import Skip

Value = TypeVar("Value")


class HeldOutSet(HeldOutImages):
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
        super().__init__(image.size, self._source.problems(reach))

    def __len__(self) -> int:
        return self._size

    @property
    def record(self) -> DataRecord:
        """The identity of the set for checkpoints, wherever it lies."""
        return DataRecord(samples=len(self), shards=len(self._source.shards), content=self._source.content)

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

    def stored_image(self, number: int) -> bytes:  # noqa: D102
        return self._source.read(*self._source.place(number), self._reader, ("image",)).image

    def _batch(self, views: Views, images: UInt8[Tensor, "batch 3 height width"]) -> HeldOutBatch:
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

    def view(self, number: int) -> Pixels:  # noqa: D102
        return evaluation_view(self.stored_image(number), self._image)

    def place_of(self, number: int) -> str:  # noqa: D102
        return self._source.shards[self._source.place(number)[0]]

    def skip(self, number: int, reason: str) -> Skip:  # noqa: D102
        return self._source.skip(self._source.place(number)[0], self._key(number), reason)

    def _skip(self, number: int, reason: str) -> None:
        skip = self.skip(number, reason)
        self._skipped.setdefault((skip.shard, skip.key), skip)

    def _key(self, number: int) -> str:
        return self._source.key_or_row(*self._source.place(number), self._reader)


def _captions(sample: Sample, config: CaptionConfig) -> CaptionsByField:
    return captions_by_field(sample.parts.get(TXT), sample.fields, config)
