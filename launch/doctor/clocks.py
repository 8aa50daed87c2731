"""Clocks of the ranks: stores refuse requests of a clock that is off, and times in logs mislead."""

import statistics
import time
from collections.abc import Iterable

from launch.doctor.check import CHECKS, Check, Place
from launch.findings import Finding, State

_TIMES = 5
_WARN, _FAIL = 1.0, 60.0  # seconds; stores of objects refuse 15 minutes
_FIX = "time synchronisation (chrony, ntpd) on every machine"


@CHECKS.register("clocks")
class Clocks(Check):
    """How far the ranks' clocks differ, read behind the same barrier. Collective."""

    def findings(self, place: Place) -> Iterable[Finding]:  # noqa: D102
        world = place.world
        if world.size == 1:
            return [Finding("clocks", "ok", "one rank, one clock")]
        differences: list[list[float]] = []
        for _ in range(_TIMES):
            world.barrier()
            times = world.gather_objects(time.time())
            differences.append([one - times[0] for one in times])
        off = [statistics.median(column) for column in zip(*differences, strict=True)]
        return [skew_of(off)]


def skew_of(off: list[float]) -> Finding:
    """The finding on clocks that are so many seconds off that of rank 0."""
    rank = max(range(len(off)), key=lambda rank: abs(off[rank]))
    skew = max(off) - min(off)
    words = f"they differ by {skew:,.3f} s, most on rank {rank}"
    state: State = "fail" if skew > _FAIL else "warn" if skew > _WARN else "ok"
    return Finding("clocks", state, words, _FIX)
