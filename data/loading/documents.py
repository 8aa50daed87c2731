"""The interleaved documents that ride along with a rank's samples: read, tokenized, cut, their images decoded."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from data.images.augment import AugmentConfig
from data.images.views import training_view
from data.loading.slots import SlotReader
from data.loading.substitution import ShardRow
from data.loading.workers import WorkerInfo
from data.samples.bad_sample import BadSampleError
from data.samples.document_tokens import DocumentTokenizer, DocumentTokens
from data.samples.documents import document_pieces
from data.shards.reader import ShardReader
from data.shards.source import Sample, Source
from vlm.batch import Documents, Skip
from vlm.model.image_spec import ImageSpec

Pixels = NDArray[np.uint8]


class DocumentExample(NamedTuple):
    """All that a step is given of one document besides the pixels of its images."""

    sample: Sample
    tokens: DocumentTokens


class LoadedDocuments(NamedTuple):
    """The documents of a step on one rank: their part, the owner of each of their images, and what is logged."""

    part: Documents
    image_owners: Int64[Tensor, " images"]
    keys: tuple[str, ...]
    skipped: tuple[Skip, ...]
    counts: dict[str, int]


@dataclass(frozen=True)
class DocumentReader:
    """Reader of one document for one visit; its crops are keyed by (seed, epoch, sample id, number of the image)."""

    tokenizer: DocumentTokenizer
    image: ImageSpec
    augment: AugmentConfig
    seed: int
    reader: ShardReader

    def read(self, source: Source, place: ShardRow, epoch: int, pixels: Pixels) -> DocumentExample:
        """The tokens of a stored document; the crops of those of its images that are used go to the first `pixels`.

        Raises:
            BadSampleError: it cannot be used.
        """
        sample = self._sample(source, place, ("json",))
        tokens = self.tokenizer(document_pieces(sample.fields, self.tokenizer.config.mark))
        images = self._sample(source, place, tokens.images).parts
        for number, suffix in enumerate(tokens.images):
            if suffix not in images:
                raise BadSampleError(f"its json names an image {suffix!r:.60}, which is not among its members")
            key = (self.seed, epoch, sample.id, number)
            training_view(images[suffix], self.image, self.augment, key, pixels[number])
        return DocumentExample(sample, tokens)

    def _sample(self, source: Source, place: ShardRow, parts: tuple[str, ...]) -> Sample:
        try:
            return source.read(*place, self.reader, parts)
        except OSError as error:
            raise BadSampleError(f"it cannot be read ({error.strerror or error})") from error


class DocumentLoader:
    """Loader of the documents of a step that ride along with a rank's samples, `first_sample` the first of these.

    Document j of N rides along with sample floor(j G / N) of a global batch of G: ranks and micro-batches share them
    out evenly, whatever their number. `slots` are the documents of this rank.
    """

    def __init__(self, slots: SlotReader, reader: DocumentReader, global_batch: int, first_sample: int) -> None:
        self.slots = slots
        self._reader = reader
        per_step = slots.order.global_batch
        self._owners = [document * global_batch // per_step - first_sample for document in slots.slots]

    @property
    def most_images(self) -> int:
        """The images that a step has at most."""
        return len(self.slots.slots) * self._reader.tokenizer.config.max_images

    def load(self, step: int, pixels: Pixels, worker: WorkerInfo) -> LoadedDocuments:
        """The documents of one step, bad ones replaced; their images go to the first `pixels`, one after another."""
        examples: list[DocumentExample] = []
        skipped: list[Skip] = []
        owners: list[int] = []
        for pick, owner in zip(self.slots.picks(step), self._owners, strict=True):
            worker.set_status(self.slots.status(step, pick))
            example, skip = self.slots.read(step, pick, partial(self._reader.read, pixels=pixels[len(owners) :]))
            examples.append(example)
            owners += [owner] * len(example.tokens.images)
            if skip is not None:
                skipped.append(skip)
        self.slots.discard_before(step)
        return LoadedDocuments(
            part=self._reader.tokenizer.part([example.tokens for example in examples], self._owners),
            image_owners=torch.tensor(owners, dtype=torch.int64),
            keys=tuple(example.sample.key for example in examples),
            skipped=tuple(skipped),
            counts=dict(Counter(example.sample.source for example in examples)),
        )


def document_slots(per_step: int, global_batch: int, samples: range) -> range:
    """The documents of a global batch that ride along with these of its samples."""
    return range(math.ceil(samples.start * per_step / global_batch), math.ceil(samples.stop * per_step / global_batch))
