"""The training stream: global batches by number, and each rank's rows of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.loading.loader import BatchLoader, SampleReader, Tokenize
from data.loading.substitution import SubstitutionLog
from data.loading.summary import SourceSummary, batch_notices
from data.loading.workers import load_ahead
from data.order.order import Order, SourceCounts
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.reader import ShardReader
from data.shards.source import Source, open_source, require_captions
from data.shards.store import is_remote
from vlm.batch import Batch
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec


class TrainStream:
    """A run's batches: which samples are in global batch s depends on data, `seed`, `global_batch` and mix alone.

    Ranks, workers and restarts change nothing, and starting at any step costs the same. `num_samples` is one epoch: all
    samples of all sources once (with weights, some sources have come more often by then, some less). `problems` lists
    what was unusable at the start (cut shards, samples without an image); those found later come with their batch.
    Substitutions are kept below `record`, the run's directory.

    Raises:
        UserError: a pattern, shard or source that cannot be trained on.
    """

    def __init__(
        self,
        config: DataConfig,
        image: ImageSpec,
        tokenizer: Tokenize,
        *,
        global_batch: int,
        seed: int,
        world: World,
        record: Path | None = None,
    ) -> None:
        if global_batch < world.size:
            raise UserError(f"a global batch of {global_batch} leaves some of {world.size} ranks without a sample")
        require_lanes(config.lanes, global_batch)
        self._config = config
        self._world = world
        cache = ShardCache(config.cache, config.retry)
        sources = [_open(config, name, cache) for name in config.sources]
        self.num_samples = sum(source.num_samples for source in sources)
        self.problems = tuple(problem for source in sources for problem in source.problems(cache))
        self.max_bad_share = config.max_bad_share
        self.labelled = all(source.labelled for source in sources)
        self.order = _order(config, sources, global_batch, seed)
        fractions = [count / self.order.mix.period for count in self.order.mix.counts]
        self.sources = tuple(
            SourceSummary(source.name, source.shards, source.num_samples, fraction, source.content)
            for source, fraction in zip(sources, fractions, strict=True)
        )
        slots = range(world.rank * global_batch // world.size, (world.rank + 1) * global_batch // world.size)
        self._log = SubstitutionLog(None if record is None else record / "substitutions", f"rank-{world.rank:05d}")
        reader = SampleReader(config, image, seed, ShardReader(cache))
        self._load = BatchLoader(sources, self.order, slots, reader, tokenizer, self._log)
        self._restored: list[dict[str, Any]] = []
        self.notices = (
            *batch_notices(self.sources, global_batch),
            *_cache_notices(config, self.order, sources, world),
        )

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        """This rank's rows of `num_steps` global batches from `start_step` on, in pinned memory for a GPU.

        Raises:
            UserError: a source has nothing usable left, or no batch came within the recipe's patience.
        """
        self._log.load(start_step, self._restored)
        workers, prefetch = self._config.workers, self._config.prefetch
        ring = self._load.use_ring(workers, prefetch)
        yield from load_ahead(
            self._load,
            range(start_step, start_step + num_steps),
            workers=workers,
            prefetch=prefetch,
            arrive=lambda sent: sent.received(ring),
            pinned=self._world.device.type == "cuda",
            patience=self._config.patience,
        )

    def state(self, step: int) -> dict[str, Any]:
        """State of the stream after `step` steps, for a checkpoint: the substitutions made ahead. Collective."""
        everyone = self._world.gather_objects(self._log.state(step))
        records = {(record["step"], record["slot"]): record for rank in everyone for record in rank}
        return {"substitutions": [records[slot] for slot in sorted(records)]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, at whatever world size."""
        self._restored = list(state.get("substitutions", ()))

    def discard_before(self, step: int) -> None:
        """Drop records that no checkpoint can lead back to, the oldest being of `step`."""
        self._log.discard_folders_before(step)


def require_lanes(lanes: int | None, global_batch: int) -> None:
    """Raise UserError when a global batch cannot be dealt to so many lanes."""
    if lanes is not None and global_batch % lanes:
        near = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        best = min(near, key=lambda n: abs(n - lanes))
        raise UserError(f"data.lanes: {lanes} does not divide the global batch of {global_batch}; nearest: {best}")


def _cache_notices(config: DataConfig, order: Order, sources: Sequence[Source], world: World) -> tuple[str, ...]:
    """Lines for the user before remote shards are read: a cache that cannot hold what is read at once."""
    remote = [source for source in sources if is_remote(source.shards[0])]
    at_once = config.shuffle_shards * -(-order.lanes // world.size)
    needed = sum(min(at_once, len(source.shards)) * source.mean_bytes for source in remote)
    if needed <= config.cache.limit:
        return ()
    return (
        f"data.cache.limit: {config.cache.limit / 1e9:.0f} GB is less than the {needed / 1e9:.0f} GB of shards that a "
        "rank reads at once, so shards will be fetched repeatedly; fewer data.lanes or data.shuffle_shards need less",
    )


def _open(config: DataConfig, name: str, cache: ShardCache) -> Source:
    index = FolderIndex(cache, f"data.sources.{name}.shards")
    source = open_source(name, config.sources[name].patterns, index, root=config.root)
    require_captions(source, config.caption_of(name), f"data.sources.{name}")
    return source


def _order(config: DataConfig, sources: list[Source], global_batch: int, seed: int) -> Order:
    weights = {
        source.name: config.sources[source.name].weight if config.mix == "weight" else float(source.num_samples)
        for source in sources
    }
    counts = [SourceCounts(source.name, source.counts, weights[source.name]) for source in sources]
    return Order(seed, counts, global_batch, lanes=config.lanes, window=config.shuffle_shards)
