"""Shards fetched into the cache ahead of their use, in the background of each process that reads."""

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data.shards.cache import ShardCache
from data.shards.stamp import Stamp


class Prefetcher:
    """Fetches the shards that will be needed next, so that a reader finds them in the cache.

    At most `most_shards` of the shards asked for, and of those at most `most_bytes` (half the cache's limit if None;
    give each process of a node its share): what is fetched early must not push out what is read now. What cannot be
    fetched is left for the reader to meet and report. The thread starts with the first `ask` of a process; a pickled or
    forked prefetcher starts its own, with nothing asked for yet.
    """

    def __init__(self, cache: ShardCache, *, most_shards: int = 4, most_bytes: int | None = None) -> None:
        self.cache = cache
        self.most_shards = most_shards
        self.most_bytes = cache.config.limit // 2 if most_bytes is None else most_bytes
        self._begin()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.cache, self.most_shards, self.most_bytes)

    def _begin(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._wanted: dict[str, Stamp | None] = {}
        self._sizes: dict[str, int] = {}
        self._full = False
        self._current: str | None = None
        self._give_up = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def ask(self, names: Sequence[str], stamps: Mapping[str, Stamp] | None = None) -> None:
        """Replace what is wanted, the most urgent first; a shard being fetched that is not wanted any more is left.

        `stamps` are the states that are expected, as for `ShardCache.local`.
        """
        if self._process != os.getpid():  # forked: the thread did not come along, and the lock may be held for ever
            self._begin()
        with self._changed:
            self._wanted = {name: (stamps or {}).get(name) for name in names[: self.most_shards]}
            self._sizes = {name: size for name, size in self._sizes.items() if name in self._wanted}
            self._full = self._stopped = False
            if self._current not in self._wanted:
                self._give_up.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shard-prefetch", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def stop(self) -> None:
        """End the thread; a later `ask` starts another."""
        if self._process != os.getpid():
            self._begin()
        with self._changed:
            thread, self._thread = self._thread, None
            self._stopped = True
            self._give_up.set()
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *ended: object) -> None:
        self.stop()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            size: int | None = 0
            with suppress(Exception):  # the reader meets it again, and reports it
                size = self._fetch(job)
            with self._changed:
                self._current = None
                if size is None:
                    self._full |= self._wanted is job.wanted
                elif job.name in self._wanted and not job.give_up.is_set():
                    self._sizes[job.name] = size

    def _next(self) -> "_Job | None":
        """Waits for the next shard to fetch; None when stopped."""
        with self._changed:
            while not self._stopped:
                name = next((name for name in self._wanted if name not in self._sizes), None)
                if name is not None and not self._full:
                    self._current, self._give_up = name, threading.Event()
                    left = self.most_bytes - sum(self._sizes.values())
                    return _Job(name, self._wanted, left, self._give_up)
                self._changed.wait()
            return None

    def _fetch(self, job: "_Job") -> int | None:
        """The bytes that the shard takes in the cache; None if there is no room to fetch it early."""
        if (self.cache.stamp(job.name, job.give_up).size or 0) > job.bytes_left:
            return None
        return self.cache.local(job.name, job.wanted[job.name], job.give_up).stat().st_size


@dataclass(frozen=True)
class _Job:
    """A shard to fetch, from the list that wants it, and what cancels that."""

    name: str
    wanted: Mapping[str, Stamp | None]
    bytes_left: int
    give_up: threading.Event


def _rebuilt(cache: ShardCache, most_shards: int, most_bytes: int) -> Prefetcher:
    return Prefetcher(cache, most_shards=most_shards, most_bytes=most_bytes)
