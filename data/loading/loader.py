"""Loading of one rank's rows of a global batch: read, decoded, with captions chosen, bad samples replaced."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig
from data.images.views import training_view
from data.loading.pixel_ring import PixelRing, Slot
from data.loading.substitution import ShardRow, Substitution, SubstitutionLog, no_substitute, substitutes
from data.loading.workers import WorkerInfo
from data.order.order import Order
from data.randomness import Draws
from data.samples.bad_sample import BadSampleError
from data.samples.captions import ChosenCaptions, captions_by_field, choose
from data.shards.prefetch import Prefetcher
from data.shards.reader import ShardReader
from data.shards.source import Sample, Source
from data.shards.store import is_remote
from vlm.batch import Batch, BatchPart, Images, Skip, Texts
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import TokenBatch

Tokenize = Callable[[Sequence[str]], TokenBatch]
_PREFETCH_EVERY = 8  # batches
_MOST_AHEAD = 4096  # shards; the cache's limit is the bound that counts


class SentBatch(NamedTuple):
    """A batch on its way between processes: its pixels go apart, through the ring where there is room."""

    batch: Batch
    pixels: UInt8[Tensor, "samples 3 height width"] | Slot

    def received(self, ring: PixelRing) -> Batch:
        """The whole batch, in the training process."""
        images = Images(ring.images(self.pixels))
        return replace(self.batch, parts={"image": images, **self.batch.parts})


class TrainingExample(NamedTuple):
    """All that a step is given of one sample besides its pixels."""

    sample: Sample
    caption: ChosenCaptions
    label: int | None


@dataclass(frozen=True)
class SampleReader:
    """Reader of one sample for one visit; all that is random in it is keyed by (seed, epoch, sample id)."""

    config: DataConfig
    image: ImageSpec
    seed: int
    reader: ShardReader

    def read(self, source: Source, place: ShardRow, epoch: int, pixels: NDArray[np.uint8]) -> TrainingExample:
        """The caption and label of a stored sample, its crop written to `pixels` [3, size, size].

        Raises:
            BadSampleError: it cannot be used.
        """
        try:
            sample = source.read(*place, self.reader)
        except OSError as error:
            raise BadSampleError(f"it cannot be read ({error.strerror or error})") from error
        return self.view(sample, epoch, pixels)

    def view(self, sample: Sample, epoch: int, pixels: NDArray[np.uint8]) -> TrainingExample:
        """The same of a sample that was read. Raises as `read`."""
        key = (self.seed, epoch, sample.id)
        policy = self.config.caption_of(sample.source)
        captions = captions_by_field(sample.parts.get("txt"), sample.fields, policy)
        caption = choose(captions, policy, Draws("caption", *key))
        label = sample.label
        training_view(sample.image, self.image, self.config.augment_of(sample.source), key, pixels)
        return TrainingExample(sample, caption, label)


class BatchLoader:
    """Loader of the rows in `slots` of global batch number `step`, in this process or in one forked from it."""

    def __init__(
        self,
        sources: Sequence[Source],
        order: Order,
        slots: range,
        reader: SampleReader,
        tokenizer: Tokenize,
        log: SubstitutionLog,
    ) -> None:
        self._sources = tuple(sources)
        self._order = order
        self._slots = slots
        self._reader = reader
        self._tokenizer = tokenizer
        self._log = log
        self._shard_numbers: dict[tuple[int, str], int] = {}
        remote = any(is_remote(source.shards[0]) for source in sources)
        # Ahead of use, the ranks of a node may together fill half of its cache.
        room = reader.config.cache.limit // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cache = reader.reader.cache
        self._prefetcher = Prefetcher(cache, most_shards=_MOST_AHEAD, most_bytes=room) if remote else None
        self._has_prefetched = False
        self._ring = self.use_ring(0, 0)

    def use_ring(self, workers: int, prefetch: int) -> PixelRing:
        """Send the pixels through memory that is used again, shared with workers that are forked from now on."""
        self._ring = PixelRing.ahead(workers, prefetch, len(self._slots), self._reader.image.size)
        return self._ring

    def __call__(self, step: int, worker: WorkerInfo) -> SentBatch:
        """The rows of one step, bad samples replaced; `worker` gets its status set at each sample."""
        self._fetch_ahead(step, worker)
        picks = self._order.picks(step, self._slots)
        images, buffer = self._ring.room(worker.number)
        examples: list[TrainingExample] = []
        skipped: list[Skip] = []
        for row, (number, epoch, *place) in enumerate(zip(*(column.tolist() for column in picks), strict=True)):
            source, slot = self._sources[number], self._slots[row]
            worker.set_status(f"step {step}: {source.shards[place[0]]}")
            example, skip = self._example(step, slot, number, epoch, (place[0], place[1]), buffer[row])
            examples.append(example)
            if skip is not None:
                skipped.append(skip)
        self._log.discard_before(step)
        return collate(step, images, examples, tuple(skipped), self._tokenizer)

    def _example(
        self, step: int, slot: int, number: int, epoch: int, place: ShardRow, pixels: NDArray[np.uint8]
    ) -> tuple[TrainingExample, Skip | None]:
        source = self._sources[number]
        substitution = self._log.find(step, slot)
        names = (source.shards[place[0]], source.stable_names[place[0]])
        if substitution is not None and not substitution.is_about(names, place[1]):
            substitution = None
        try:
            if substitution is None:
                return self._reader.read(source, place, epoch, pixels), None
            return self._reader.read(source, self._place(number, substitution), epoch, pixels), substitution.skip
        except BadSampleError as error:
            reason = str(error) if substitution is None else substitution.skip.reason
        return self._substitute(step, slot, number, epoch, place, reason, pixels)

    def _substitute(
        self, step: int, slot: int, number: int, epoch: int, place: ShardRow, reason: str, pixels: NDArray[np.uint8]
    ) -> tuple[TrainingExample, Skip]:
        source, last, tried = self._sources[number], reason, 1
        for candidate in substitutes(self._order, self._reader.seed, step, slot):
            try:
                example = self._reader.read(source, candidate, epoch, pixels)
            except BadSampleError as error:
                last, tried = f"{source.shards[candidate[0]]}: {error}", tried + 1
                continue
            substitute = f"{example.sample.shard}:{example.sample.key}"
            skip = source.skip(place[0], source.key_or_row(*place, self._reader.reader), reason, substitute)
            names = source.stable_names[candidate[0]], source.stable_names[place[0]]
            self._log.record(Substitution(step, slot, place[1], names[0], candidate[1], skip, names[1]))
            return example, skip
        raise no_substitute(source.name, tried, last)

    def _place(self, number: int, substitution: Substitution) -> ShardRow:
        """The present shard and row of a substitute."""
        if not self._shard_numbers:
            self._shard_numbers = {
                (source, name): shard
                for source, one in enumerate(self._sources)
                for names in (one.shards, one.stable_names)
                for shard, name in enumerate(names)
            }
        shard = self._shard_numbers.get((number, substitution.shard))
        if shard is None:
            raise BadSampleError(f"its substitute's shard {substitution.shard} is no longer there")
        return shard, substitution.row

    def _fetch_ahead(self, step: int, worker: WorkerInfo) -> None:
        """One process a rank asks for the shards that its lanes come to next."""
        due = not self._has_prefetched or step % _PREFETCH_EVERY < worker.stride
        if self._prefetcher is None or not worker.is_first or not due:
            return
        self._has_prefetched = True
        ahead = self._order.shards_ahead(step, self._slots)
        stamps = {self._sources[source].shards[shard]: self._sources[source].stamp(shard) for source, shard in ahead}
        self._prefetcher.ask(list(stamps), stamps)


def collate(
    step: int,
    pixels: UInt8[Tensor, "samples 3 size size"] | Slot,
    examples: Sequence[TrainingExample],
    skipped: tuple[Skip, ...],
    tokenizer: Tokenize,
) -> SentBatch:
    """A batch from its pixels and examples; labels only where every sample has one."""
    labels = [example.label for example in examples if example.label is not None]
    batch = Batch(
        step=step,
        sample_ids=torch.tensor([example.sample.id for example in examples], dtype=torch.int64),
        keys=tuple(example.sample.key for example in examples),
        parts=_texts(examples, tokenizer),
        labels=torch.tensor(labels, dtype=torch.int64) if len(labels) == len(examples) else None,
        skipped=skipped,
        counts=_counts(examples),
    )
    return SentBatch(batch, pixels)


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
