"""Entries of a source's shards: from their folders' manifests, and by indexing what these do not cover."""

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data.pools.base import Workers
from data.shards.cache import ShardCache
from data.shards.indexing import Indexer, index_shards
from data.shards.lock import locked
from data.shards.manifest import (
    NAME,
    TEXTS,
    FolderManifest,
    ShardEntry,
    manifest_bytes,
    parse_manifest,
    parse_texts,
    texts_bytes,
)
from data.shards.patterns import require_no_command
from data.shards.sidecar import SUFFIX, to_bytes
from data.shards.stamp import Stamp
from data.shards.statistics import ShardStatistics, sum_statistics
from data.shards.store import (
    companion,
    exists,
    is_remote,
    read_bytes,
    store_of,
    without_query,
    write_remote,
)
from vlm.atomic import write_bytes
from vlm.errors import UserError

_log = logging.getLogger(__name__)
_STAT_THREADS = 16
_STATS_A_TASK = 256
_SLOW_STAT_SECONDS = 100e-6  # on a local disk it is a tenth of this, and threads would only wait for one another


@dataclass(frozen=True)
class FolderIndex:
    """Reader and writer of the manifests of folders of shards; `publish` also writes them into remote folders."""

    cache: ShardCache
    where: str
    publish: bool = False

    def load_or_build(
        self,
        names: Sequence[str],
        *,
        fresh: bool = False,
        workers: Workers = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, ShardEntry]:
        """The entries of these shards; what no manifest covers is indexed, and the manifests are written anew.

        Local shards that changed since they were indexed are indexed again. A manifest is believed about remote shards
        until they are opened; `fresh` believes none. Of several processes on a node one indexes while the others wait.
        `progress` is called with the number of shards indexed, and of all to index.

        Raises:
            UserError: a shard cannot be read, or is the output of a command, which nothing here runs; or the store of
                its manifest cannot.
        """
        require_no_command(names, self.where)
        self._contact(names)
        entries = {} if fresh else self._covered(names)
        if len(entries) < len(names):
            with self._alone(folder_of(names[0])):
                entries = {} if fresh else self._covered(names, warn=True)
                missing = [name for name in names if name not in entries]
                entries.update(self._index(missing, workers, progress, fresh=fresh))
        return {name: entries[name] for name in names}

    def known(self, names: Sequence[str]) -> dict[str, ShardEntry]:
        """The entries of those of these shards that manifests describe as they are now; nothing is made or written.

        Raises:
            UserError: a store of shards cannot be reached, or its manifest not be read.
        """
        self._contact(names)
        return self._covered(names)

    def _contact(self, names: Sequence[str]) -> None:
        for name in {store_of(name): name for name in reversed(names) if is_remote(name)}.values():
            try:
                self.cache.contact(name)
            except OSError as error:
                raise UserError(f"{self.where}: {_named(error, name)}") from error

    def _covered(self, names: Sequence[str], *, warn: bool = False) -> dict[str, ShardEntry]:
        entries: dict[str, ShardEntry] = {}
        for folder in dict.fromkeys(map(folder_of, names)):
            entries.update({_join(folder, name): entry for name, entry in self._read(folder, warn=warn).shards.items()})
        entries = {name: entries[name] for name in names if name in entries}
        local = [name for name in entries if not is_remote(name)]
        for name in local:
            if not entries[name].content:  # of an index without checksums: it is cheap to find out again
                del entries[name]
        local = [name for name in local if name in entries]
        for name, stamp in zip(local, self._stamps(local), strict=True):
            if stamp != Stamp(entries[name].bytes, entries[name].version):
                del entries[name]
        return entries

    def _stamps(self, names: Sequence[str]) -> Iterator[Stamp | None]:
        """The stamps of local shards; a file system that answers slowly is asked by several threads."""
        waits = [0.0]
        for name in names[:_STATS_A_TASK]:
            began = time.monotonic()
            stamp = self._stamp(name)
            waits.append(time.monotonic() - began)
            yield stamp
        if statistics.median(waits) < _SLOW_STAT_SECONDS:
            yield from map(self._stamp, names[_STATS_A_TASK:])
            return
        tasks = [names[start : start + _STATS_A_TASK] for start in range(_STATS_A_TASK, len(names), _STATS_A_TASK)]
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            for stamps in pool.map(lambda task: [self._stamp(name) for name in task], tasks):
                yield from stamps

    def _stamp(self, name: str) -> Stamp | None:
        try:
            return self.cache.stamp(name)
        except OSError:
            return None

    def _index(
        self,
        names: Sequence[str],
        workers: Workers,
        progress: Callable[[int, int], None] | None,
        *,
        fresh: bool = False,
    ) -> dict[str, ShardEntry]:
        indexer = Indexer(self.cache, self.where, fresh)
        entries: dict[str, ShardEntry] = {}
        texts: dict[str, ShardStatistics] = {}
        for name, index in index_shards(names, indexer, workers=workers):
            entries[name], texts[name] = ShardEntry.of(index), index.header.statistics
            if self.publish and is_remote(name):
                self._write_remote(companion(name, SUFFIX), to_bytes(index))
            if progress is not None:
                progress(len(entries), len(names))
        for folder in dict.fromkeys(map(folder_of, names)):
            in_folder = [name for name in names if folder_of(name) == folder]
            self._write(folder, {name: entries[name] for name in in_folder}, {name: texts[name] for name in in_folder})
        return entries

    def statistics(self, names: Sequence[str]) -> ShardStatistics:
        """Statistics of the texts of these shards, all together; their entries must have been loaded or built."""
        texts: dict[str, ShardStatistics] = {}
        for folder in dict.fromkeys(map(folder_of, names)):
            texts.update(
                {_join(folder, name): text_statistics for name, text_statistics in self._read_texts(folder).items()}
            )
        indexer = Indexer(self.cache, self.where)
        missing = {name: indexer(name).header.statistics for name in names if name not in texts}
        for folder in dict.fromkeys(map(folder_of, missing)):
            in_folder = {
                _base(name): text_statistics for name, text_statistics in missing.items() if folder_of(name) == folder
            }
            self._store(folder, TEXTS, texts_bytes({**self._read_texts(folder, warn=False), **in_folder}))
        return sum_statistics({**texts, **missing}[name] for name in names)

    def _read(self, folder: str, *, warn: bool) -> FolderManifest:
        """The manifest beside the shards, and over it what was kept in the cache folder."""
        shards: dict[str, ShardEntry] = {}
        for where, content in self._stored(_join(folder, NAME)):
            with _tolerating_damage(warn):  # what it said can be found out again
                shards.update(parse_manifest(content, where).shards)
        return FolderManifest(shards)

    def _read_texts(self, folder: str, *, warn: bool = True) -> dict[str, ShardStatistics]:
        texts: dict[str, ShardStatistics] = {}
        for where, content in self._stored(_join(folder, TEXTS)):
            with _tolerating_damage(warn):
                texts.update(parse_texts(content, where))
        return texts

    def _stored(self, name: str) -> Iterator[tuple[str, bytes]]:
        """The content stored beside the shards under a name, then that in the cache folder in its stead."""
        in_cache = self.cache.place(name, "")
        try:
            if not is_remote(name):
                if os.path.exists(name):
                    yield name, Path(name).read_bytes()
            elif exists(name, self.cache.retry):
                yield name, read_bytes(name, self.cache.retry)
            if in_cache.exists():
                yield str(in_cache), in_cache.read_bytes()
        except OSError as error:
            raise UserError(f"{self.where}: {_named(error, name)}") from error

    def _write_remote(self, name: str, content: bytes) -> None:
        try:
            write_remote(name, content, self.cache.retry)
        except OSError as error:
            raise UserError(f"{self.where}: {_named(error, name)}") from error

    def _write(self, folder: str, entries: dict[str, ShardEntry], texts: dict[str, ShardStatistics]) -> None:
        """Add these shards to the folder's manifest, and drop local ones that are gone."""
        merged = {**self._read(folder, warn=False).shards, **{_base(name): entry for name, entry in entries.items()}}
        described = {
            **self._read_texts(folder, warn=False),
            **{_base(name): text_statistics for name, text_statistics in texts.items()},
        }
        remote = is_remote(folder)
        shards = {name: merged[name] for name in sorted(merged) if remote or os.path.exists(_join(folder, name))}
        self._store(folder, NAME, manifest_bytes(FolderManifest(shards)))
        self._store(folder, TEXTS, texts_bytes({name: described[name] for name in shards if name in described}))

    def _store(self, folder: str, base: str, content: bytes) -> None:
        remote, name = is_remote(folder), _join(folder, base)
        in_cache = self.cache.place(name, "")
        if remote and self.publish:
            self._write_remote(name, content)
        elif not remote and os.access(folder, os.W_OK):
            write_bytes(Path(name), content)
        else:
            self._keep(in_cache, content)
            return
        with suppress(NotADirectoryError):  # there is no cache folder
            in_cache.unlink(missing_ok=True)

    def _keep(self, path: Path, content: bytes) -> None:
        """Keep what cannot lie beside the shards in the cache folder; where that cannot be written either, say so."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
        except OSError as error:
            message = f"{self.where}: no index can be kept in {path.parent} ({error.strerror or error})"
            if self.publish:
                raise UserError(f"{message}; XDG_CACHE_HOME names another cache folder") from error
            _log.warning("%s: the shards are read anew each time", message)

    @contextmanager
    def _alone(self, folder: str) -> Iterator[None]:
        lock = self.cache.place(folder, ".lock")
        with ExitStack() as locks:
            # Without a cache folder nothing can be locked: then several processes do the same work, which harms nobody.
            with suppress(OSError):
                lock.parent.mkdir(parents=True, exist_ok=True)
                locks.enter_context(locked(lock))
            yield


@contextmanager
def _tolerating_damage(warn: bool) -> Iterator[None]:
    """Goes on without an index that cannot be read, with a warning where `warn` asks for one."""
    try:
        yield
    except UserError as error:
        if warn:
            _log.warning("%s", error)


def _named(error: OSError, name: str) -> str:
    """An error of the system, or of a store, that names the file."""
    return str(error) if name in str(error) else f"{name} cannot be read ({error.strerror or error})"


def folder_of(name: str) -> str:
    """The folder part of a shard's name, with its last slash; "" for a name without one."""
    return name[: without_query(name).rfind("/") + 1]


def _base(name: str) -> str:
    return name[len(folder_of(name)) :]


def _join(folder: str, name: str) -> str:
    return folder + name
