"""The data of a recipe as each rank reaches it: shards, how fast they read, and whether their indexes are fresh."""

import time
from collections.abc import Iterable, Iterator, Sequence

from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.patterns import expand_shards
from data.shards.store import is_command, open_stream
from launch.doctor.check import CHECKS, Check, Place
from launch.findings import Finding, State
from vlm.errors import UserError

_READ, _PIECE = 2**23, 2**20  # bytes
_SLOW = 20.0  # MB/s
_INDEX = "vlm data index SHARDS, once, before many ranks start"


@CHECKS.register("sources")
class Sources(Check):
    """Whether each source's shards are there, and how fast one of them reads; every rank reads another one."""

    needs_recipe = True

    def findings(self, place: Place) -> Iterable[Finding]:  # noqa: D102
        recipe = place.needed
        for name, source in recipe.data.sources.items():
            where = f"data.sources.{name}.shards"
            try:
                shards = expand_shards(source.patterns, recipe.data.root, where)
            except UserError as error:
                yield Finding("sources", "fail", str(error), f"{where}, or data.root")
                continue
            yield _read(place, name, shards)


def _read(place: Place, name: str, shards: Sequence[str]) -> Finding:
    """The finding on the shard that this rank reads first, spread over all of them."""
    shard = shards[place.world.rank * len(shards) // place.world.size % len(shards)]
    words = f"{name}: {len(shards):,} shard{'' if len(shards) == 1 else 's'}"
    if is_command(shard):
        return Finding("sources", "ok", f"{words}, the output of a command, which is not run here")
    began, size = time.perf_counter(), 0
    try:
        with open_stream(shard, place.needed.data.retry) as stream:
            while size < _READ and (piece := stream.read(_PIECE)):
                size += len(piece)
    except OSError as error:
        words = f"{name}: {shard} cannot be read: {error.strerror or error}"
        return Finding("sources", "fail", words, "the address, its store, or the permissions of this machine")
    rate = size / max(time.perf_counter() - began, 1e-9) / 1e6
    state: State = "warn" if rate < _SLOW and size == _READ else "ok"
    return Finding(
        "sources", state, f"{words}, read at {rate:,.0f} MB/s", "a nearer copy, or data.cache on a local disk"
    )


@CHECKS.register("index")
class Index(Check):
    """Whether manifests describe all shards as they are now; a start indexes what they do not."""

    needs_recipe = True

    def findings(self, place: Place) -> Iterable[Finding]:  # noqa: D102
        recipe = place.needed
        if recipe.data.mode == "sequential":
            return [Finding("index", "ok", "data.mode: sequential reads none")]
        return self._of_sources(place)

    def _of_sources(self, place: Place) -> Iterator[Finding]:
        recipe = place.needed
        cache = ShardCache(recipe.data.cache, recipe.data.retry)
        for name, source in recipe.data.sources.items():
            where = f"data.sources.{name}.shards"
            try:
                shards = expand_shards(source.patterns, recipe.data.root, where)
                known = FolderIndex(cache, where).known(shards)
            except UserError as error:
                yield Finding("index", "fail", str(error), "see sources")
                continue
            missing = len(shards) - len(known)
            if missing:
                words = f"{name}: {missing:,} of {len(shards):,} shards have no index, or changed since"
                yield Finding("index", "warn", words, _INDEX)
                continue
            samples = sum(entry.samples for entry in known.values())
            bad = sum(entry.problems for entry in known.values())
            words = f"{name}: fresh, {samples:,} samples, {bad:,} unusable by their headers"
            share = bad / max(1, samples + bad)
            fix = "vlm data check SHARDS says what is wrong with them"
            yield Finding("index", "warn" if share > recipe.data.max_bad_share else "ok", words, fix)
