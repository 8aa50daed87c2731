"""Profiles of some steps: what time goes into each phase, and a trace by torch's profiler."""

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import Field, field_validator
from torch.profiler import ProfilerActivity, profile, record_function

from vlm.activity import activity
from vlm.atomic import write_text
from vlm.config import Config
from vlm.metric import FigureTable

_MOST_STEPS = 1_000
_SPAN = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
_OPERATIONS = 40  # of torch, in the table of a rank
# How gloo and NCCL call a collective in a trace, whoever asked for it.
_COLLECTIVE = re.compile(r"^(gloo|nccl|ucc|mpi):|^ncclDevKernel")
_TITLES = {
    "data": "data wait",
    "transfer": "host to device",
    "towers": "towers",
    "decoder": "decoder",
    "similarity": "similarity",
    "communication": "communication",
    "backward": "backward",
    "optimizer": "optimizer",
    "averages": "averages",
}
HOOKS, REST, ALONGSIDE = "hooks (log, evaluations, checkpoints)", "rest", "collectives, beside other work"


class ProfileConfig(Config):
    """A profile of some steps of a run; it slows them down a little."""

    steps: str = Field(pattern=r"^\d+\.\.\d+$", description='the first and the last step, from 1: "100..110"')

    @field_validator("steps")
    @classmethod
    def _require_span(cls, text: str) -> str:
        first, last = span_of(text)
        if not 0 < first <= last:
            raise ValueError("the first step is at least 1, and the last not before it")
        if last - first >= _MOST_STEPS:
            raise ValueError(f"at most {_MOST_STEPS:,} steps are profiled: a trace holds each operation")
        return text


def span_of(text: str) -> tuple[int, int]:
    """The first and the last step that `100..110` names."""
    found = _SPAN.fullmatch(text)
    if found is None:
        raise ValueError('steps are written as first..last: "100..110"')
    return int(found[1]), int(found[2])


class PhaseTimes:
    """Seconds of each phase without those of the phases within it; what is in none is the rest."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._within: list[float] = []
        self._began = clock()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Time a phase, and make it a range of the trace."""
        began = self._clock()
        self._within.append(0.0)
        try:
            with record_function(name):
                yield
        finally:
            took = self._clock() - began
            self.seconds[name] += took - self._within.pop()
            if self._within:
                self._within[-1] += took

    def total(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began


class StepProfile:
    """A profile that is being taken on this rank, from its making to `finish`."""

    def __init__(self, device: torch.device) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(activities=kinds)
        self._profile.start()
        self._times = PhaseTimes()
        activity.ranges = self._times.range

    def finish(self, files: Path) -> dict[str, float]:
        """End it, write trace and operations as `files` with .json.gz and .txt, and return the seconds of each row."""
        activity.ranges = None
        total = self._times.total()
        self._profile.stop()
        seconds = rows_of(self._times.seconds, total)
        events = self._profile.events() or ()
        found = [event.time_range.elapsed_us() for event in events if _COLLECTIVE.match(event.name)]
        seconds[ALONGSIDE] = sum(found) / 1e6
        aside = files.with_name(f".{files.name}.json.gz")
        self._profile.export_chrome_trace(str(aside))
        os.replace(aside, files.with_name(f"{files.name}.json.gz"))
        operations = self._profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=_OPERATIONS)
        write_text(files.with_name(f"{files.name}.txt"), operations)
        return seconds


def rows_of(seconds: Mapping[str, float], total: float) -> dict[str, float]:
    """The seconds of phases by their titles, all hooks in one, and the rest."""
    rows = {title: seconds.get(name, 0.0) for name, title in _TITLES.items()}
    rows[HOOKS] = sum(value for name, value in seconds.items() if name not in _TITLES)
    return {**rows, REST: max(0.0, total - sum(seconds.values()))}


def table_of(ranks: Sequence[Mapping[str, float]], first: int, last: int) -> FigureTable:
    """The table of all ranks' seconds: milliseconds a step, in the mean and on the slowest rank, and shares."""
    num_steps = last - first + 1
    total = sum(value for row in ranks for name, value in row.items() if name != ALONGSIDE)
    rows = {
        name: [
            1e3 * sum(row[name] for row in ranks) / len(ranks) / num_steps,
            sum(row[name] for row in ranks) / total if total else 0.0,
            1e3 * max(row[name] for row in ranks) / num_steps,
        ]
        for name in ranks[0]
    }
    return FigureTable(
        title=f"time of steps {first} to {last}",
        columns=("ms a step", "share", "ms, slowest rank"),
        rows=rows,
        unit=("number", "fraction", "number"),
        note=f"{ALONGSIDE}: as the backends tell them, those of the engine too; they are no part of the sum",
    )
