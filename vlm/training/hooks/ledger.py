"""The samples that a run skipped and saw: told in its files, summed over ranks, and stopped when too much is bad."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vlm.batch import Batch, Skip
from vlm.training.hooks.base import Hook, StepEvent
from vlm.training.run_directory import RunDirectory
from vlm.training.skips import check_bad_fraction, reasons_of


class Ledger(Hook):
    """Collects every rank's skips and counts between two flushes. Collective where it says so."""

    def __init__(
        self,
        run: RunDirectory,
        max_bad_share: float,
        samples_per_step: int,
        start_step: int,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self._run = run
        self._max_bad_share = max_bad_share
        self._samples_per_step = samples_per_step
        self._start_step = start_step
        self._skips: list[tuple[int, Skip]] = []
        self._counts: Counter[str] = Counter(counts or {})
        self._reasons: Counter[str] = Counter()
        self.num_skipped = run.num_skips()

    def after_step(self, event: StepEvent) -> None:  # noqa: D102
        self.add(event.batch)

    def add(self, batch: Batch) -> None:
        """Take note of this rank's rows of a step."""
        self._skips.extend((batch.step + 1, skip) for skip in batch.skipped)
        self._counts.update(batch.counts)

    def manifest_fields(self, step: int) -> dict[str, Any]:
        """The counts that the next line of the log needs. All skips so far are written before. Collective."""
        self.flush(step)
        return {"counts": self.counts()}

    def flush(self, step: int) -> None:
        """Write what all ranks skipped since the last flush to the ledger. Collective.

        Raises:
            UserError: more than the allowed share of the samples since the start could not be used.
        """
        skips = self._run.log_skips(self._skips)
        self._skips = []
        self.num_skipped += len(skips)
        self._reasons.update(reasons_of(skips))
        check_bad_fraction(self._reasons, (step - self._start_step) * self._samples_per_step, self._max_bad_share)

    def counts(self) -> dict[str, int]:
        """The rows of each source and field over all ranks since the last `fractions`, for a checkpoint. Collective."""
        everyone: Counter[str] = Counter()
        for counts in self._run.world.gather_objects(dict(self._counts)):
            everyone.update(counts)
        return dict(everyone)

    def fractions(self) -> dict[str, float]:
        """The share of each source among the rows of all ranks since the last call, and of each field. Collective."""
        everyone = self.counts()
        self._counts.clear()
        totals: Counter[str] = Counter()
        for name, count in everyone.items():
            totals[name.partition("/")[0]] += count
        return {f"data/{name}": count / totals[name.partition("/")[0]] for name, count in sorted(everyone.items())}
