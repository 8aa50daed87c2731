"""Loading of one rank's rows of a global batch: read, decoded, with captions chosen, bad samples replaced."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig
from data.counterfactuals.counterfactual import Edited, counterfactuals
from data.counterfactuals.editor import CaptionInSample
from data.counterfactuals.stored_editor import StoredNegatives
from data.images.views import training_view
from data.loading.documents import DocumentLoader, LoadedDocuments
from data.loading.edited import Tokenize, counterfactual_texts, counts_by_editor, degraded_images, without_extent
from data.loading.pixel_ring import PixelRing, Slot
from data.loading.slots import SlotReader
from data.loading.substitution import ShardRow
from data.loading.workers import WorkerInfo
from data.randomness import Draws
from data.samples.bad_sample import BadSampleError
from data.samples.captions import DROPPED, CaptionsByField, ChosenCaptions, captions_by_field, choose
from data.shards.prefetch import Prefetcher
from data.shards.reader import ShardReader
from data.shards.sidecar import PARTS
from data.shards.source import Sample, Source
from data.shards.store import is_remote
from data.shards.tar import TEXT_SUFFIXES
from vlm.batch import COUNTERFACTUALS, DEGRADED, DOCUMENT_IMAGES, DOCUMENTS, Batch, BatchPart, Images, Skip, Texts
from vlm.model.image_spec import ImageSpec

_PREFETCH_EVERY = 8  # batches
_MOST_AHEAD = 4096  # shards; the cache's limit is the bound that counts


class SentBatch(NamedTuple):
    """A batch on its way between processes: its pixels go apart, through the ring where there is room.

    Behind those of the samples lie those of `more_images`, part after part, whose own pixels are without extent.
    """

    batch: Batch
    pixels: UInt8[Tensor, "images 3 height width"] | Slot | None
    more_images: Mapping[str, Images] = {}

    def received(self, ring: PixelRing | None) -> Batch:
        """The whole batch, in the training process."""
        if ring is None or self.pixels is None:
            return self.batch
        pixels, start = ring.images(self.pixels), len(self.batch)
        parts: dict[str, BatchPart] = {"image": Images(pixels[:start])}
        for name, part in self.more_images.items():
            stop = start + len(part.pixels)
            parts[name], start = replace(part, pixels=pixels[start:stop]), stop
        return replace(self.batch, parts={**parts, **self.batch.parts})


class TrainingExample(NamedTuple):
    """All that a step is given of one sample besides its pixels.

    `edited` are the counterfactuals of its caption, None where its source has none made; `degraded` is the strength of
    the worse copy of its image, None where it has none. `key` is what the visit's draws are keyed by.
    """

    sample: Sample
    caption: ChosenCaptions
    label: int | None
    key: tuple[int, int, int]
    edited: Edited | None = None
    degraded: float | None = None


@dataclass(frozen=True)
class SampleReader:
    """Reader of one sample for one visit; all that is random in it is keyed by (seed, epoch, sample id)."""

    config: DataConfig
    image: ImageSpec
    seed: int
    reader: ShardReader

    def ring(self, workers: int, prefetch: int, samples: int, more_images: int = 0) -> PixelRing | None:
        """Memory for what so many processes hold ready of batches of `samples`; None where no images are read."""
        if not self.config.images:
            return None
        degraded = 0 if self.config.degraded is None else samples
        return PixelRing.ahead(workers, prefetch, samples + degraded + more_images, self.image.size)

    def read(self, source: Source, place: ShardRow, epoch: int, pixels: NDArray[np.uint8] | None) -> TrainingExample:
        """The caption and label of a stored sample, its crop written to `pixels` [3, size, size]; None: not read.

        Raises:
            BadSampleError: it cannot be used.
        """
        try:
            sample = source.read(*place, self.reader, TEXT_SUFFIXES if pixels is None else PARTS)
        except OSError as error:
            raise BadSampleError(f"it cannot be read ({error.strerror or error})") from error
        return self.view(sample, epoch, pixels)

    def view(self, sample: Sample, epoch: int, pixels: NDArray[np.uint8] | None) -> TrainingExample:
        """The same of a sample that was read. Raises as `read`."""
        key = (self.seed, epoch, sample.id)
        policy = self.config.caption_of(sample.source)
        captions = captions_by_field(sample.parts.get("txt"), sample.fields, policy)
        caption = choose(captions, policy, Draws("caption", *key))
        label, degraded = sample.label, None
        edited = self._edited(sample, caption, captions, key)
        if pixels is not None:
            training_view(sample.image, self.image, self.config.augment_of(sample.source), key, pixels)
            degraded = None if self.config.degraded is None else self.config.degraded.drawn_strength(key)
        return TrainingExample(sample, caption, label, key, edited, degraded)

    def _edited(
        self, sample: Sample, caption: ChosenCaptions, captions: CaptionsByField, key: tuple[int, int, int]
    ) -> Edited | None:
        """The counterfactuals of a chosen caption, of the empty text none; None where the source has none made."""
        config = self.config.counterfactuals_of(sample.source)
        if config is None or caption.field == DROPPED:
            return None if config is None else Edited()
        others = tuple(text for texts in captions.values() for text in texts)
        return counterfactuals(CaptionInSample(caption.text, others, sample.fields), config, key)


class BatchLoader:
    """Loader of the rows in `slots` of global batch number `step`, in this process or in one forked from it."""

    def __init__(
        self,
        slots: SlotReader,
        reader: SampleReader,
        tokenizer: Tokenize,
        documents: DocumentLoader | None = None,
    ) -> None:
        self._slots = slots
        self._reader = reader
        self._tokenizer = tokenizer
        self._documents = documents
        read = [slots] if documents is None else [slots, documents.slots]
        self._read = tuple(read)
        remote = any(is_remote(source.shards[0]) for one in read for source in one.sources)
        # Ahead of use, the ranks of a node may together fill half of its cache.
        room = reader.config.cache.limit // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cache = reader.reader.cache
        self._prefetcher = Prefetcher(cache, most_shards=_MOST_AHEAD, most_bytes=room) if remote else None
        self._has_prefetched = False
        self._ring = self.use_ring(0, 0)

    def use_ring(self, workers: int, prefetch: int) -> PixelRing | None:
        """Send the pixels through memory that is used again, shared with workers that are forked from now on."""
        in_documents = 0 if self._documents is None else self._documents.most_images
        self._ring = self._reader.ring(workers, prefetch, len(self._slots.slots), in_documents)
        return self._ring

    def __call__(self, step: int, worker: WorkerInfo) -> SentBatch:
        """The rows of one step, bad samples replaced; `worker` gets its status set at each sample."""
        self._fetch_ahead(step, worker)
        images, buffer = room_for(self._ring, worker, len(self._slots.slots))
        examples: list[TrainingExample] = []
        skipped: list[Skip] = []
        for row, pick in enumerate(self._slots.picks(step)):
            worker.set_status(self._slots.status(step, pick))
            example, skip = self._slots.read(step, pick, partial(self._reader.read, pixels=buffer[row]))
            examples.append(example)
            if skip is not None:
                skipped.append(skip)
        self._slots.discard_before(step)
        sent = collate(step, images, buffer, examples, tuple(skipped), self._reader.config, self._tokenizer)
        if self._documents is None:
            return sent
        assert isinstance(buffer, np.ndarray)  # images are read where there are documents
        used = len(examples) + sum(len(part.pixels) for part in sent.more_images.values())
        return with_documents(sent, self._documents.load(step, buffer[used:], worker))

    def _fetch_ahead(self, step: int, worker: WorkerInfo) -> None:
        """One process a rank asks for the shards that its lanes come to next."""
        due = not self._has_prefetched or step % _PREFETCH_EVERY < worker.stride
        if self._prefetcher is None or not worker.is_first or not due:
            return
        self._has_prefetched = True
        stamps = {name: stamp for slots in self._read for name, stamp in slots.shards_ahead(step).items()}
        self._prefetcher.ask(list(stamps), stamps)


def room_for(
    ring: PixelRing | None, worker: WorkerInfo, rows: int
) -> tuple[Slot | Tensor | None, NDArray[np.uint8] | list[None]]:
    """The handle to send and the memory for each row's pixels; nothing where no images are read."""
    return (None, [None] * rows) if ring is None else ring.room(worker.number)


def collate(
    step: int,
    pixels: UInt8[Tensor, "samples 3 size size"] | Slot | None,
    buffer: NDArray[np.uint8] | list[None],
    examples: Sequence[TrainingExample],
    skipped: tuple[Skip, ...],
    config: DataConfig,
    tokenizer: Tokenize,
) -> SentBatch:
    """A batch from its pixels, which lie in `buffer`, and examples; labels only where every sample has one."""
    labels = [example.label for example in examples if example.label is not None]
    edited = [example.edited for example in examples]
    parts, counts = _texts(examples, tokenizer), _counts(examples)
    if config.editors:
        text = parts["text"]
        assert isinstance(text, Texts)
        parts[COUNTERFACTUALS] = counterfactual_texts(edited, text, tokenizer)
        counts |= counts_by_editor(edited)
    batch = Batch(
        step=step,
        sample_ids=torch.tensor([example.sample.id for example in examples], dtype=torch.int64),
        keys=tuple(example.sample.key for example in examples),
        parts=parts,
        labels=torch.tensor(labels, dtype=torch.int64) if len(labels) == len(examples) else None,
        skipped=(*skipped, *_true_negatives(examples, config)),
        counts=counts,
    )
    if config.degraded is None or not isinstance(buffer, np.ndarray):
        return SentBatch(batch, pixels)
    copies = [(example.degraded, example.key) for example in examples]
    return SentBatch(batch, pixels, {DEGRADED: degraded_images(copies, config.degraded, buffer)})


def with_documents(sent: SentBatch, documents: LoadedDocuments) -> SentBatch:
    """The batch with documents that ride along with its samples; their pixels lie behind those of the samples."""
    batch = replace(
        sent.batch,
        parts={**sent.batch.parts, DOCUMENTS: documents.part},
        skipped=(*sent.batch.skipped, *documents.skipped),
        counts={**sent.batch.counts, **documents.counts},
        document_keys=documents.keys,
    )
    images = Images(without_extent(len(documents.image_owners)), owners=documents.image_owners)
    return sent._replace(batch=batch, more_images={**sent.more_images, DOCUMENT_IMAGES: images})


def _true_negatives(examples: Sequence[TrainingExample], config: DataConfig) -> Iterator[Skip]:
    """What the ledger is to say of samples whose stored wrong captions are captions of theirs."""
    for example in examples:
        for name in () if example.edited is None else example.edited.failed:
            one = config.counterfactuals_of(example.sample.source)
            editor = None if one is None else one.editors[name]
            if isinstance(editor, StoredNegatives):
                reason = f"its {editor.field} repeat its captions: the sample is used without a counterfactual"
                yield Skip(example.sample.source, example.sample.shard, example.sample.key, reason, "")


def _texts(examples: Sequence[TrainingExample], tokenizer: Tokenize) -> dict[str, BatchPart]:
    """The text of each sample, and all captions of each where the caption policy gives them."""
    parts: dict[str, BatchPart] = {"text": Texts(*tokenizer([example.caption.text for example in examples]))}
    captions = [text for example in examples for text in example.caption.all]
    if captions:
        owners = [sample for sample, example in enumerate(examples) for _ in example.caption.all]
        parts["captions"] = Texts(*tokenizer(captions), owners=torch.tensor(owners, dtype=torch.int64))
    return parts


def _counts(examples: Sequence[TrainingExample]) -> dict[str, int]:
    """Numbers of rows of each source, and of captions of each field: logged as shares."""
    named = Counter(f"source/{example.sample.source}" for example in examples)
    named.update(f"caption/{example.caption.field}" for example in examples)
    return dict(named)
