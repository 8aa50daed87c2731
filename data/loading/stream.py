"""The training stream: global batches by number, and each rank's rows of them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.loading.document_stream import DocumentStream
from data.loading.edited import Tokenize, require_editable
from data.loading.loader import BatchLoader, SampleReader
from data.loading.neighbours import SourceNeighbours, neighbour_notices, read_neighbours, require_batches
from data.loading.slots import SlotReader
from data.loading.substitution import SubstitutionLog
from data.loading.summary import batch_notices, summarised
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
from vlm.training.image_schedule import ImageStages


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
        require_lanes(config.lanes, global_batch, "data.lanes", "global batch")
        self._config = config
        self._world = world
        cache = ShardCache(config.cache, config.retry)
        sources = [_open(config, name, cache) for name in config.sources]
        self.num_samples = sum(source.num_samples for source in sources)
        problems = tuple(problem for source in sources for problem in source.problems(cache))
        self.max_bad_share = config.max_bad_share
        self.labelled = all(source.labelled for source in sources)
        near = {
            source.name: read_neighbours(source, neighbours)
            for source in sources
            if (neighbours := config.sources[source.name].neighbours) is not None
        }
        self.order = _order(config, sources, near, global_batch, seed)
        require_batches(self.order)
        pairs = summarised(sources, self.order, {name: one.identity for name, one in near.items()})
        slots = range(world.rank * global_batch // world.size, (world.rank + 1) * global_batch // world.size)
        folder, writer = None if record is None else record / "substitutions", f"rank-{world.rank:05d}"
        self._log = SubstitutionLog(folder, writer)
        shard_reader = ShardReader(cache)
        reader = SampleReader(config, image, seed, shard_reader)
        self._documents, documents = None, None
        if config.documents is not None:
            require_lanes(config.documents.lanes, config.documents.per_step, "data.documents.lanes", "documents")
            log = SubstitutionLog(None if folder is None else folder / "documents", writer)
            self._documents = DocumentStream(config, config.documents, cache, log, seed)
            documents = self._documents.loader(image, tokenizer, shard_reader, global_batch, slots)
        self.sources = (*pairs, *(() if self._documents is None else self._documents.sources))
        self.problems = (*problems, *(() if self._documents is None else self._documents.problems))
        read = SlotReader(sources, self.order, slots, self._log, seed, shard_reader)
        if world.is_main:
            for source in sources:
                require_editable(source, config, shard_reader)
        self._load = BatchLoader(read, reader, tokenizer, documents)
        self._restored: dict[str, list[dict[str, Any]]] = {}
        self.stages = ImageStages()  # whoever knows the length of the run sets those that it has
        self.notices = (
            *batch_notices(pairs, global_batch),
            *neighbour_notices(self.order),
            *_cache_notices(config, self.order, sources, world),
        )

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        """This rank's rows of `num_steps` global batches from `start_step` on, in pinned memory for a GPU.

        Raises:
            UserError: a source has nothing usable left, or no batch came within the recipe's patience.
        """
        for name, log in self._logs().items():
            log.load(start_step, self._restored.get(name, ()))
        workers, prefetch = self._config.workers, self._config.prefetch
        ring = self._load.use_ring(workers, prefetch)
        yield from load_ahead(
            self._load,
            range(start_step, start_step + num_steps),
            workers=workers,
            prefetch=prefetch,
            arrive=lambda sent: self.stages.shown(sent.received(ring)),
            pinned=self._world.device.type == "cuda",
            patience=self._config.patience,
        )

    def state(self, step: int) -> dict[str, Any]:
        """State of the stream after `step` steps, for a checkpoint: the substitutions made ahead. Collective."""
        state = {}
        for name, log in self._logs().items():
            everyone = self._world.gather_objects(log.state(step))
            records = {(record["step"], record["slot"]): record for rank in everyone for record in rank}
            state[name] = [records[slot] for slot in sorted(records)]
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, at whatever world size."""
        self._restored = {name: list(state.get(name, ())) for name in self._logs()}

    def discard_before(self, step: int) -> None:
        """Drop records that no checkpoint can lead back to, the oldest being of `step`."""
        for log in self._logs().values():
            log.discard_folders_before(step)

    def _logs(self) -> dict[str, SubstitutionLog]:
        """The records of substitutions by their names in a checkpoint."""
        logs = {"substitutions": self._log}
        return logs if self._documents is None else {**logs, "document_substitutions": self._documents.log}


def require_lanes(lanes: int | None, global_batch: int, key: str, what: str) -> None:
    """Raise UserError, which begins with `key`, when so many samples a step cannot be dealt to so many lanes."""
    if lanes is not None and global_batch % lanes:
        near = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        best = min(near, key=lambda n: abs(n - lanes))
        raise UserError(f"{key}: {lanes} does not divide the {what} of {global_batch}; nearest: {best}")


def _cache_notices(config: DataConfig, order: Order, sources: Sequence[Source], world: World) -> tuple[str, ...]:
    """Lines for the user before remote shards are read: a cache that cannot hold what is read at once."""
    remote = [source for source in sources if is_remote(source.shards[0])]
    at_once = config.shuffle_shards * -(-order.lanes // world.size)
    of_all = {name for name, source in config.sources.items() if source.neighbours is not None}
    shards = {one.name: len(one.shards) if one.name in of_all else min(at_once, len(one.shards)) for one in remote}
    needed = sum(shards[source.name] * source.mean_bytes for source in remote)
    if needed <= config.cache.limit:
        return ()
    return (
        f"data.cache.limit: {config.cache.limit / 1e9:.0f} GB is less than the {needed / 1e9:.0f} GB of shards that a "
        "rank reads at once, so shards will be fetched repeatedly; fewer data.lanes or data.shuffle_shards need less",
    )


def _open(config: DataConfig, name: str, cache: ShardCache) -> Source:
    index = FolderIndex(cache, f"data.sources.{name}.shards")
    source = open_source(name, config.sources[name].patterns, index, root=config.root, images=config.images)
    require_captions(source, config.caption_of(name), f"data.sources.{name}")
    return source


def _order(
    config: DataConfig, sources: list[Source], near: Mapping[str, SourceNeighbours], global_batch: int, seed: int
) -> Order:
    weights = config.weights({source.name: source.num_samples for source in sources})
    neighbours = {name: one.neighbours for name, one in near.items()}
    counts = [
        SourceCounts(source.name, source.counts, weights[source.name], neighbours.get(source.name))
        for source in sources
    ]
    return Order(seed, counts, global_batch, lanes=config.lanes, window=config.shuffle_shards)
