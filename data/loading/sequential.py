"""Streaming shards from first byte to last, without an index and without any local copy."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import webdataset

from data.config import DataConfig
from data.loading.edited import Tokenize
from data.loading.loader import SampleReader, SentBatch, TrainingExample, collate, room_for
from data.loading.pixel_ring import PixelRing
from data.loading.summary import SourceSummary, batch_notices
from data.loading.workers import WorkerInfo, load_ahead
from data.randomness import Draws, hash_key
from data.samples.bad_sample import BadSampleError
from data.shards.cache import ShardCache
from data.shards.patterns import expand_shards
from data.shards.reader import ShardReader
from data.shards.retry import RetryConfig
from data.shards.sidecar import key_id
from data.shards.source import Sample, sample_id, stable_names
from data.shards.store import is_command, open_stream, store_of
from data.shards.streaming import Streamed, stream_samples
from data.shards.tar import NO_IMAGE, TEXT_SUFFIXES, Problem, image_suffix, shown_name
from vlm.batch import Batch, Skip
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec
from vlm.training.image_schedule import ImageStages

NOTICE = (
    "data.mode sequential: shards are drawn with replacement and streamed. Not kept: each sample once an epoch, the "
    "same batches at another number of ranks or workers, and exact resume (a resumed run draws new shards)"
)
_SHUFFLED = 2_000  # samples that a worker holds, undecoded, per source
_LEAST_FAILURES, _MOST_FAILURES = 3, 100  # shards in a row
_LEAST_JUDGED, _MOST_USELESS = 500, 10_000  # samples in a row
_ENOUGH_SHARDS = 8


class SequentialStream:
    """Batches for shards that are neither indexed nor copied: streamed, shards drawn with replacement.

    Says in `notices` which promises of `TrainStream` it does not keep. Bad samples and shards are skipped and reported.

    Raises:
        UserError: a pattern that names nothing, or a source without `num_samples`, which nothing here can count.
    """

    problems: tuple[Skip, ...] = ()

    def __init__(
        self, config: DataConfig, image: ImageSpec, tokenizer: Tokenize, *, global_batch: int, seed: int, world: World
    ) -> None:
        self._config = config
        self._world = world
        if global_batch < world.size:
            raise UserError(f"a global batch of {global_batch} leaves some of {world.size} ranks without a sample")
        self._rows = (world.rank + 1) * global_batch // world.size - world.rank * global_batch // world.size
        self._tokenizer = tokenizer
        cache = ShardCache(config.cache, config.retry)
        self._reader = SampleReader(config, image, seed, ShardReader(cache))
        sizes = {name: _declared(name, source.num_samples) for name, source in config.sources.items()}
        weights = config.weights(sizes)
        self._shards = {name: _expand(config, name) for name in sizes}
        for name, shards in self._shards.items():
            _contact(name, shards, cache)
        self.num_samples = sum(sizes.values())
        self.max_bad_share = config.max_bad_share
        self.labelled = True  # as far as is known before the first sample is read
        self._fractions = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        self.sources = tuple(
            SourceSummary(name, self._shards[name], sizes[name], fraction) for name, fraction in self._fractions.items()
        )
        self.stages = ImageStages()  # whoever knows the length of the run sets those that it has
        self.notices = (NOTICE, *batch_notices(self.sources, global_batch))

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        """This rank's rows of `num_steps` batches; another `start_step` draws other shards."""
        sources = {
            source.name: _EndlessSource(
                source.name, source.shards, source.num_samples, self._config.retry, self._config.images
            )
            for source in self.sources
        }
        key = (self._reader.seed, start_step, self._world.rank)
        workers, prefetch = self._config.workers, self._config.prefetch
        ring = self._reader.ring(workers, prefetch, self._rows)
        load = SequentialLoader(sources, self._fractions, self._rows, ring, self._reader, self._tokenizer, key)
        yield from load_ahead(
            load,
            range(start_step, start_step + num_steps),
            workers=workers,
            prefetch=prefetch,
            arrive=lambda sent: self.stages.shown(sent.received(ring)),
            pinned=self._world.device.type == "cuda",
            patience=self._config.patience,
        )

    def state(self, step: int) -> dict[str, Any]:  # noqa: ARG002 - the protocol's signature
        """Nothing: the stream does not resume exactly."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def discard_before(self, step: int) -> None:
        """Nothing to drop."""


class SequentialLoader:
    """Loader of the next rows of this process's own streams, whichever step they are for."""

    def __init__(
        self,
        sources: Mapping[str, "_EndlessSource"],
        fractions: Mapping[str, float],
        rows: int,
        ring: PixelRing | None,
        reader: SampleReader,
        tokenizer: Tokenize,
        key: tuple[int, ...],
    ) -> None:
        self._sources = dict(sources)
        self._fractions = dict(fractions)
        self._rows = rows
        self._ring = ring
        self._reader = reader
        self._tokenizer = tokenizer
        self._key = key
        self._streams: dict[str, Iterator[Sample | Skip]] | None = None

    def __call__(self, step: int, worker: WorkerInfo) -> SentBatch:
        """The rows of a step; what cannot be used is passed over."""
        if self._streams is None:
            self._streams = {
                name: source.stream((*self._key, worker.number), worker) for name, source in self._sources.items()
            }
        images, buffer = room_for(self._ring, worker, self._rows)
        draws = Draws("sequential-mix", *self._key, step)
        examples: list[TrainingExample] = []
        skipped: list[Skip] = []
        for row in range(self._rows):
            name = draws.weighted(self._fractions)
            example, skips = self._next(name, step, buffer[row])
            examples.append(example)
            skipped.extend(skips)
        return collate(step, images, buffer, examples, tuple(skipped), self._reader.config, self._tokenizer)

    def _next(self, name: str, step: int, pixels: Any) -> tuple[TrainingExample, list[Skip]]:
        """The next sample that can be used, and all that could not.

        Raises:
            UserError: there is none in so many samples that there may be none at all.
        """
        skips: list[Skip] = []
        assert self._streams is not None
        for item in self._streams[name]:
            if isinstance(item, Sample):
                try:
                    return self._reader.view(item, step, pixels), skips
                except BadSampleError as error:
                    item = Skip(item.source, item.shard, item.key, str(error), "the next one")
            skips.append(item)
            if len(skips) % _LEAST_JUDGED == 0:
                self._sources[name].require_hope(skips)
        raise AssertionError("an endless stream ended")


@dataclass(frozen=True)
class _EndlessSource:
    """One source as an endless stream of samples."""

    name: str
    shards: tuple[str, ...]
    num_samples: int
    retry: RetryConfig
    images: bool = True

    def require_hope(self, skips: Sequence[Skip]) -> None:
        """Raise UserError where as many samples in a row are useless as the source has, and from all over it."""
        shards = {skip.shard for skip in skips}
        if len(skips) < min(self.num_samples, _MOST_USELESS) or len(shards) < min(len(self.shards), _ENOUGH_SHARDS):
            return
        reasons = "; ".join(
            f"{count:,} x {reason}" for reason, count in Counter(s.reason for s in skips).most_common(2)
        )
        last = f"the last is {shown_name(skips[-1].key)} of {skips[-1].shard}"
        raise UserError(f"data.sources.{self.name}: {len(skips):,} samples in a row cannot be used ({reasons}); {last}")

    def stream(self, key: tuple[int, ...], worker: WorkerInfo) -> Iterator[Sample | Skip]:
        """Samples of shards drawn by `key`, shuffled within a buffer; broken shards as skips.

        Raises:
            UserError: many shards in a row, or all of few, hold nothing to use.
        """
        # webdataset's own buffer wants a generator of the standard library
        rng = random.Random(hash_key("sequential-buffer", self.name, *key))
        shuffle = webdataset.filters.shuffle(_SHUFFLED, initial=100, rng=rng)
        yield from shuffle(self._samples(Draws("sequential-shards", self.name, *key), worker))

    def _samples(self, draws: Draws, worker: WorkerInfo) -> Iterator[Sample | Skip]:
        useless: list[str] = []
        names = dict(zip(self.shards, stable_names(self.shards), strict=True))
        while True:
            shard = self.shards[draws.integer(len(self.shards))]
            worker.set_status(shard)
            usable, reason = False, ""
            for stored in self._stored(shard):
                item = self._sample(shard, names[shard], stored)
                usable |= isinstance(item, Sample)
                reason = item.reason if isinstance(item, Skip) else reason
                yield item
            useless = [] if usable else [*useless, shard]
            all_of_them = len(useless) >= _LEAST_FAILURES and set(useless) == set(self.shards)
            if all_of_them or len(useless) > _MOST_FAILURES:
                message = f"{len(useless)} shards in a row hold nothing to use; the last is {shard}: {reason}"
                raise UserError(f"data.sources.{self.name}: {message}")

    def _stored(self, shard: str) -> Iterator[Streamed | Problem]:
        try:
            stream = open_stream(shard, self.retry)
        except OSError as error:
            yield Problem("", f"the shard cannot be read ({error!s:.200})")
            return
        with stream:
            yield from stream_samples(stream, shard)

    def _sample(self, shard: str, stable_name: str, stored: Streamed | Problem) -> Sample | Skip:
        if isinstance(stored, Problem):
            return Skip(self.name, shard, stored.key, stored.reason, "the next one" if stored.key else "")
        key, members = stored
        suffix = image_suffix(members)
        if self.images and suffix is None:
            return Skip(self.name, shard, key, NO_IMAGE, "the next one")
        if not self.images and not {"txt", "json"} & members.keys():
            return Skip(self.name, shard, key, "it has no text", "the next one")
        image = {"image": members[suffix]} if self.images and suffix is not None else {}
        parts = {part: members[part] for part in TEXT_SUFFIXES if part in members}
        number = sample_id(self.name, stable_name, key_id(key.encode("utf-8", "surrogatepass")))
        return Sample(self.name, shard, key, number, {**image, **parts})


def _declared(name: str, num_samples: int | None) -> int:
    if num_samples is None:
        raise UserError(f"data.sources.{name}.num_samples: `mode: sequential` counts nothing, so it must be told")
    return num_samples


def _contact(name: str, shards: Sequence[str], cache: ShardCache) -> None:
    try:
        for shard in {store_of(shard): shard for shard in reversed(shards) if not is_command(shard)}.values():
            cache.contact(shard)
    except OSError as error:
        raise UserError(f"data.sources.{name}.shards: {error}") from error


def _expand(config: DataConfig, name: str) -> tuple[str, ...]:
    shards: Sequence[str] = expand_shards(config.sources[name].patterns, config.root, f"data.sources.{name}.shards")
    return tuple(shards)
