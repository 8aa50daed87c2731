"""The rows of a global batch that one rank trains on, in parts: images, texts, and whatever else belongs to samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import pad

from vlm.skip import Skip as Skip

Part = TypeVar("Part", bound="BatchPart")

DOCUMENTS, DOCUMENT_IMAGES = "documents", "document_images"
COUNTERFACTUALS, DEGRADED = "counterfactuals", "degraded"


@dataclass(frozen=True)
class BatchPart:
    """One kind of input: tensors with an entry in each row, and the samples that the rows are of.

    A subclass is a frozen dataclass of tensors of equal first dimension, and of values that hold for all rows. `owners`
    says of which of the batch's samples each row is, in ascending order; None where every sample has one row.
    """

    owners: Int64[Tensor, " rows"] | None = field(default=None, kw_only=True)

    def take(self: Part, start: int, stop: int) -> Part:
        """The rows of the batch's samples `start` to `stop`, which are counted from 0 then."""
        if self.owners is None:
            return self._with_tensors(lambda tensor: tensor[start:stop])
        first, last = torch.searchsorted(self.owners, torch.tensor([start, stop], device=self.owners.device)).tolist()
        rows = self._with_tensors(lambda tensor: tensor[first:last])
        return replace(rows, owners=self.owners[first:last] - start)

    def to(self: Part, device: torch.device) -> Part:
        """The same on `device`; copies from pinned memory run asynchronously."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: Part) -> Part:
        """The same in memory that a GPU reads by itself."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    @classmethod
    def cat(cls: type[Part], parts: Sequence[Part], num_samples: Sequence[int]) -> Part:
        """The parts of several batches, of so many samples each, as one; short rows are padded with zeros behind."""
        if len(parts) == 1:
            return parts[0]
        joined = {
            name: _joined([getattr(part, name) for part in parts]) for name in parts[0]._tensors() if name != "owners"
        }
        owned = [part.owners for part in parts if part.owners is not None]
        starts = [sum(num_samples[:number]) for number in range(len(parts))]
        owners = torch.cat([rows + start for rows, start in zip(owned, starts, strict=True)]) if owned else None
        return replace(parts[0], **joined, owners=owners)

    def _with_tensors(self: Part, change: Callable[[Tensor], Tensor]) -> Part:
        return replace(self, **{name: change(tensor) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Images(BatchPart):
    """Pictures as the image tower takes them: 8 bits a channel, not normalised.

    `patch_dropout` is the share of their patches that the tower leaves out in training; None: as the tower does by
    itself. It is alike for all images of a batch.
    """

    pixels: UInt8[Tensor, "rows 3 height width"]
    patch_dropout: float | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Texts(BatchPart):
    """Token ids as long as the longest of these texts; shorter ones are padded behind their `lengths`."""

    tokens: Int64[Tensor, "rows length"]
    lengths: Int64[Tensor, " rows"]


@dataclass(frozen=True)
class Counterfactuals(Texts):
    """Texts that are almost right, made from the text of the sample that each is of by an editor (`editor_key`)."""

    editors: Int64[Tensor, " rows"]


@dataclass(frozen=True)
class DegradedImages(Images):
    """Worse copies of the images of the samples that they are of, by a strength between 0 and 1."""

    strengths: Float[Tensor, " rows"]


@dataclass(frozen=True)
class StandIns(BatchPart):
    """For each text of a part, the text whose embedding stands in for the image, and from what its noise is drawn.

    It is so many rows behind the text itself, in the same part; `words` are of `vlm.objectives.counter_rng`.
    """

    offsets: Int64[Tensor, " rows"]
    words: Int64[Tensor, " rows"]


@dataclass(frozen=True)
class Documents(Texts):
    """Texts with images between their tokens; the images are a part of their own, document after document.

    A token looks at the images `seen_from` to `seen_to` (exclusive) of its document's `num_images` while it tells the
    next token; the loss counts those tokens that are to be `told`. A document rides along with a sample, its owner.
    """

    told: Bool[Tensor, "rows length"]
    seen_from: Int64[Tensor, "rows length"]
    seen_to: Int64[Tensor, "rows length"]
    num_images: Int64[Tensor, " rows"]


@dataclass(frozen=True)
class Batch:
    """The samples of one global batch that one rank trains on.

    `parts` holds `image` and `text`, one row a sample, and `captions` where the caption policy gives all captions of a
    sample, its first the one that is its `text`; `counterfactuals` and `degraded` of some samples where the recipe has
    them made; `documents` and `document_images` where the data has documents, whose keys are `document_keys`. `counts`
    says how many samples are of each source, how many captions of each field, and how many counterfactuals by each
    editor.
    """

    step: int
    sample_ids: Int64[Tensor, " samples"]
    keys: tuple[str, ...]
    parts: Mapping[str, BatchPart]
    labels: Int64[Tensor, " samples"] | None = None
    skipped: tuple[Skip, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    document_keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Samples of this rank."""
        return len(self.keys)

    @property
    def pixels(self) -> UInt8[Tensor, "samples 3 height width"]:
        """The image of each sample."""
        images = self.parts["image"]
        assert isinstance(images, Images)
        return images.pixels

    @property
    def texts(self) -> Texts:
        """The text of each sample."""
        texts = self.parts["text"]
        assert isinstance(texts, Texts)
        return texts

    def owners(self, part: str) -> Int64[Tensor, " rows"]:
        """The sample of each row of a part, or of an output of that name; one row a sample without such a part."""
        owners = self.parts[part].owners if part in self.parts else None
        return torch.arange(len(self), device=self.sample_ids.device) if owners is None else owners

    def take(self, start: int, stop: int) -> "Batch":
        """Samples `start` to `stop` of these; what was skipped, counted and listed stays with the whole."""
        return replace(
            self,
            sample_ids=self.sample_ids[start:stop],
            keys=self.keys[start:stop],
            parts={name: part.take(start, stop) for name, part in self.parts.items()},
            labels=None if self.labels is None else self.labels[start:stop],
            skipped=(),
            counts={},
            document_keys=(),
        )

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`; copies from pinned memory run asynchronously."""
        return replace(
            self,
            sample_ids=self.sample_ids.to(device, non_blocking=True),
            parts={name: part.to(device) for name, part in self.parts.items()},
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
        )

    def with_patch_dropout(self, share: float | None) -> "Batch":
        """The same with this share of the patches of all its images left out."""
        parts = {
            name: replace(part, patch_dropout=share) if isinstance(part, Images) else part
            for name, part in self.parts.items()
        }
        return replace(self, parts=parts)

    def pin_memory(self) -> "Batch":
        """The same in memory that a GPU reads by itself."""
        return replace(
            self,
            sample_ids=self.sample_ids.pin_memory(),
            parts={name: part.pin_memory() for name, part in self.parts.items()},
            labels=None if self.labels is None else self.labels.pin_memory(),
        )

    @staticmethod
    def cat(batches: Sequence["Batch"]) -> "Batch":
        """The samples of several batches of one step, such as all ranks', as one batch."""
        first, sizes = batches[0], [len(batch) for batch in batches]
        labels = [batch.labels for batch in batches if batch.labels is not None]
        return replace(
            first,
            sample_ids=torch.cat([batch.sample_ids for batch in batches]),
            keys=tuple(key for batch in batches for key in batch.keys),
            document_keys=tuple(key for batch in batches for key in batch.document_keys),
            parts={
                name: type(part).cat([batch.parts[name] for batch in batches], sizes)
                for name, part in first.parts.items()
            },
            labels=torch.cat(labels) if len(labels) == len(batches) else None,
        )


def editor_key(name: str) -> int:
    """The number that stands for an editor of counterfactuals in a batch."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors under each other; those of two dimensions may be of unequal length."""
    if tensors[0].ndim == 2:
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors]
    return torch.cat(list(tensors))
