"""The training stream: global batches by number, and each rank's rows of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from data.bad_sample import BadSampleError
from data.captions import choose_caption
from data.config import DataConfig
from data.images.decode import Pixels, stack_pixels, training_view
from data.order import Line, Order
from data.randomness import Draws, Permutation
from data.shards.index import Sample, SourceIndex, index_source, require_captions
from data.shards.tar import ShardReader
from data.workers import load_ahead
from vlm.batch import Batch, Skip
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import TokenBatch
from vlm.world import World

Tokenize = Callable[[Sequence[str]], TokenBatch]
_MAX_SUBSTITUTES = 1_000


@dataclass(frozen=True)
class SourceSummary:
    """What a run's record says about a source."""

    name: str
    num_shards: int
    num_samples: int
    weight: float


class TrainStream:
    """A run's batches: which samples are in global batch s depends on data, `seed`, `global_batch` and weights alone.

    Ranks, workers and restarts change nothing, and starting at any step costs the same. `num_samples` is one epoch: all
    samples of all sources once (with weights, some sources have come more often by then, some less). `problems` lists
    what was unusable at the start (cut shards, samples without an image); those found later come with their batch.

    Raises:
        UserError: a pattern, shard or source that cannot be trained on.
    """

    def __init__(
        self, config: DataConfig, image: ImageSpec, tokenizer: Tokenize, *, global_batch: int, seed: int, world: World
    ) -> None:
        if global_batch < world.size:
            raise UserError(f"a global batch of {global_batch} leaves some of {world.size} ranks without a sample")
        self._config = config
        self._world = world
        reader = ShardReader()
        indexes = []
        for name, source in config.sources.items():
            index = index_source(name, source.patterns, root=config.root, cache=config.cache)
            require_captions(index, reader, f"data.sources.{name}")
            indexes.append(index)
        weights = [source.weight for source in config.sources.values()]
        lines = [Line(index.name, len(index), weight) for index, weight in zip(indexes, weights, strict=True)]
        self.sources = tuple(
            SourceSummary(index.name, len(index.shards), len(index), weight)
            for index, weight in zip(indexes, weights, strict=True)
        )
        self.num_samples = sum(line.num_samples for line in lines)
        self.problems = tuple(problem for index in indexes for problem in index.problems)
        rows = range(world.rank * global_batch // world.size, (world.rank + 1) * global_batch // world.size)
        slots = _Slots(Order(seed, lines), global_batch, rows)
        self._load = BatchLoader(indexes, slots, SampleReader(config, image, seed, reader), tokenizer)

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        """This rank's rows of `num_steps` global batches from `start_step` on, in pinned memory for a GPU."""
        loaded = load_ahead(
            self._load,
            range(start_step, start_step + num_steps),
            workers=self._config.workers,
            prefetch=self._config.prefetch,
            pinned=self._world.device.type == "cuda",
        )
        for rows in loaded:
            yield Batch(**rows._asdict())


class Rows(NamedTuple):
    """A Batch on its way between processes (a named tuple, so that pinning finds its tensors)."""

    step: int
    images: UInt8[Tensor, "batch 3 height width"]
    tokens: Int64[Tensor, "batch length"]
    lengths: Int64[Tensor, " batch"]
    sample_ids: Int64[Tensor, " batch"]
    keys: tuple[str, ...]
    labels: Int64[Tensor, " batch"] | None
    skipped: tuple[Skip, ...]


class Example(NamedTuple):
    """One sample as a step sees it."""

    sample: Sample
    pixels: Pixels
    caption: str
    label: int | None


@dataclass(frozen=True)
class _Slots:
    """This rank's slots of every global batch."""

    order: Order
    global_batch: int
    rows: range


class SampleReader:
    """Reads one sample for one visit; crop and caption are keyed by (seed, epoch, sample id)."""

    def __init__(self, config: DataConfig, image: ImageSpec, seed: int, reader: ShardReader) -> None:
        self.seed = seed
        self._config = config
        self._image = image
        self._reader = reader

    def read(self, sample: Sample, epoch: int) -> Example:
        """The sample's crop, caption and label in its source's `epoch`.

        Raises:
            BadSampleError: it cannot be used.
        """
        try:
            captions = sample.captions(self._reader)
            caption = choose_caption(captions, self._config.caption, Draws("caption", self.seed, epoch, sample.id))
            stored = sample.image(self._reader)
            label = sample.label(self._reader)
        except OSError as error:
            raise BadSampleError(f"it cannot be read ({error.strerror or error})") from error
        draws = Draws("crop", self.seed, epoch, sample.id)
        pixels = training_view(stored, self._image, self._config.crop_scale, self._config.flip, draws)
        return Example(sample, pixels, caption, label)


class BatchLoader:
    """Loads this rank's rows of global batch number `step`; picklable, so that workers can."""

    def __init__(
        self, sources: Sequence[SourceIndex], slots: _Slots, reader: SampleReader, tokenizer: Tokenize
    ) -> None:
        self._sources = tuple(sources)
        self._slots = slots
        self._reader = reader
        self._tokenizer = tokenizer
        self._labelled = all(source.all_have("cls") for source in sources)

    def __call__(self, step: int) -> Rows:
        """The rows of one step, bad samples replaced."""
        picks = self._slots.order.picks(step, self._slots.global_batch, self._slots.rows)
        examples: list[Example] = []
        skipped: list[Skip] = []
        for source, epoch, number in zip(*(part.tolist() for part in picks), strict=True):
            sample = self._sources[source][number]
            try:
                examples.append(self._reader.read(sample, epoch))
            except BadSampleError as error:
                substitute = self._substitute(step, source, epoch, sample)
                examples.append(substitute)
                skipped.append(sample.skip(str(error), f"{substitute.sample.shard}:{substitute.sample.key}"))
        return self._collate(step, examples, tuple(skipped))

    def _collate(self, step: int, examples: Sequence[Example], skipped: tuple[Skip, ...]) -> Rows:
        tokens = self._tokenizer([example.caption for example in examples])
        return Rows(
            step=step,
            images=stack_pixels([example.pixels for example in examples]),
            tokens=tokens.tokens,
            lengths=tokens.lengths,
            sample_ids=torch.tensor([example.sample.id for example in examples], dtype=torch.int64),
            keys=tuple(example.sample.key for example in examples),
            labels=torch.tensor([example.label for example in examples], dtype=torch.int64) if self._labelled else None,
            skipped=skipped,
        )

    def _substitute(self, step: int, source: int, epoch: int, bad: Sample) -> Example:
        """A usable sample of the source, keyed by (seed, epoch, bad id); from this global batch only if it must."""
        index = self._sources[source]
        shuffled = Permutation(len(index), "substitute", self._reader.seed, epoch, bad.id)
        numbers: NDArray[np.int64] = shuffled(np.arange(min(len(index), _MAX_SUBSTITUTES)))
        planned = self._planned_ids(step, source)
        samples = [index[number] for number in numbers.tolist()]
        for sample in sorted(samples, key=lambda sample: sample.id in planned):
            try:
                return self._reader.read(sample, epoch)
            except BadSampleError as error:
                reason = f"{sample.shard}: {sample.key}: {error}"
        raise UserError(
            f"data.sources.{index.name}: {len(samples):,} samples in a row cannot be used; the last is {reason}"
        )

    def _planned_ids(self, step: int, source: int) -> set[int]:
        picks = self._slots.order.picks(step, self._slots.global_batch, range(self._slots.global_batch))
        return self._sources[source].ids(picks.samples[picks.sources == source])
