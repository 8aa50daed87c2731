"""The samples that a run skipped and saw: told in its files, summed over ranks, and stopped when too much is bad."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlm.batch import Batch, Skip
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.training.run_directory import RunDirectory

# A share of fewer samples than this says little: with the default of 1 %, ten bad samples are always let pass.
_LEAST_JUDGED = 1_000
_SHOWN = 3


class Ledger:
    """Collects every rank's skips and counts between two flushes. Collective where it says so."""

    def __init__(
        self,
        run: RunDirectory,
        max_bad_share: float,
        global_batch: int,
        start_step: int,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self._run = run
        self._max_bad_share = max_bad_share
        self._global_batch = global_batch
        self._start_step = start_step
        self._skips: list[tuple[int, Skip]] = []
        self._counts: Counter[str] = Counter(counts or {})
        self._reasons: Counter[str] = Counter()
        self.num_skipped = run.num_skips()

    def add(self, batch: Batch) -> None:
        """Take note of this rank's rows of a step."""
        self._skips.extend((batch.step + 1, skip) for skip in batch.skipped)
        self._counts.update(batch.counts)

    def flush(self, step: int) -> None:
        """Write what all ranks skipped since the last flush to the ledger. Collective.

        Raises:
            UserError: more than the allowed share of the samples since the start could not be used.
        """
        skips = self._run.log_skips(self._skips)
        self._skips = []
        self.num_skipped += len(skips)
        self._reasons.update(reasons_of(skips))
        judge_bad(self._reasons, (step - self._start_step) * self._global_batch, self._max_bad_share)

    def counts(self) -> dict[str, int]:
        """The rows of each source and field over all ranks since `shares` was called: for a checkpoint. Collective."""
        everyone: Counter[str] = Counter()
        for counts in self._run.world.gather_objects(dict(self._counts)):
            everyone.update(counts)
        return dict(everyone)

    def shares(self) -> dict[str, float]:
        """The share of each source among the rows of all ranks since the last call, and of each field. Collective."""
        everyone = self.counts()
        self._counts.clear()
        totals: Counter[str] = Counter()
        for name, count in everyone.items():
            totals[name.partition("/")[0]] += count
        return {f"data/{name}": count / totals[name.partition("/")[0]] for name, count in sorted(everyone.items())}


def judge_bad(reasons: Mapping[str, int], num_samples: int, max_bad_share: float) -> None:
    """Raise EveryRankError, naming the commonest reasons, when too large a share of `num_samples` could not be used."""
    bad = sum(reasons.values())
    if bad <= max_bad_share * max(num_samples, _LEAST_JUDGED):
        return
    commonest = Counter(reasons).most_common(_SHOWN)
    told = "; ".join(f"{count:,} x {reason}" for reason, count in commonest)
    more = f"; and {len(reasons) - _SHOWN} other reasons" if len(reasons) > _SHOWN else ""
    raise EveryRankError(
        f"data.max_bad_share: {bad:,} of {num_samples:,} samples could not be used, more than {max_bad_share:.2%} "
        f"({told}{more}); the run's ledger.jsonl names each"
    )


def skips_of_all_ranks(skips: Sequence[Skip], source: str, world: World) -> list[Skip]:
    """The samples that any rank could not use, each once, under the name `source`, in one order. Collective."""
    found = {(skip.shard, skip.key): skip for rank in world.gather_objects(list(skips)) for skip in rank}
    return [replace(found[place], source=source) for place in sorted(found)]


def reasons_of(skips: Sequence[Skip]) -> Counter[str]:
    """How often each source gives each reason."""
    return Counter(f"{skip.source}: {skip.reason}" for skip in skips)
