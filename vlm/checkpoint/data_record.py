"""The record of a run's data in its checkpoints: enough to notice that it is not what it was, wherever it lies now."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, NonNegativeInt, model_validator

from vlm.config import Config

_MOST_RUNS = 64
_SHOWN = 3


class DataRecord(Config):
    """One source; a number alone may stand for it, as in checkpoints that knew no more."""

    samples: NonNegativeInt
    shards: NonNegativeInt | None = None
    content: tuple[str, ...] = Field(
        default=(), description="a hash of what is in each shard, or in each of 64 runs of consecutive shards"
    )

    neighbours: str = Field(default="", description="which samples come together in a batch: a hash of their labels")

    @model_validator(mode="before")
    @classmethod
    def _samples_alone(cls, given: Any) -> Any:
        return {"samples": given} if isinstance(given, int) else given


def runs_of_shards(num_shards: int) -> list[range]:
    """The shards that share one hash: each has its own as long as there are few."""
    runs = min(num_shards, _MOST_RUNS)
    return [range(run * num_shards // runs, (run + 1) * num_shards // runs) for run in range(runs)]


def differences(
    before: Mapping[str, DataRecord], now: Mapping[str, DataRecord], shards: Mapping[str, Sequence[str]]
) -> str | None:
    """Words on what differs between the data then and now; None where nothing is known to.

    `shards` are the names that the shards of each source have now.
    """
    if list(before) != list(now):
        return f"it had the sources {', '.join(before)}, in this order; now there are {', '.join(now)}"
    words = [word for name in now for word in _of_source(name, before[name], now[name], shards.get(name, ()))]
    return "; ".join(words) or None


def _of_source(name: str, before: DataRecord, now: DataRecord, shards: Sequence[str]) -> list[str]:
    if before.neighbours != now.neighbours:
        found = [f"batches of the neighbours {one.neighbours}" if one.neighbours else "none" for one in (before, now)]
        return [f"{name} had {found[0]}, now there are {found[1]}"]
    if before.samples != now.samples:
        return [f"{name} had {before.samples:,} samples, now there are {now.samples:,}"]
    if not before.content or not now.content:
        return []
    if before.shards != now.shards:
        return [f"{name} had {before.shards} shards, now there are {now.shards}"]
    wrong = [run for run, hashes in enumerate(zip(before.content, now.content, strict=False)) if len(set(hashes)) > 1]
    if not wrong:
        return []
    runs = runs_of_shards(now.shards or 0)
    places = [shards[runs[run][0]] if len(runs[run]) == 1 else _ends(runs[run], shards) for run in wrong[:_SHOWN]]
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return [f"{name} holds other samples or texts, or other names of shards, in {', '.join(places)}{more}"]


def _ends(run: range, shards: Sequence[str]) -> str:
    return f"one of the {len(run)} shards {shards[run[0]]} to {shards[run[-1]]}"


def is_known(records: Mapping[str, DataRecord]) -> bool:
    """Whether more is known of every source than how many samples it has."""
    return all(record.content for record in records.values())
