"""The folder of a run: what it is, what it measured, what it skipped; appended to as it goes, cut back on resume."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from vlm.atomic import write_text
from vlm.batch import Batch, Skip
from vlm.errors import UserError
from vlm.training.checkpoint_folder import clear_unfinished, complete_checkpoints
from vlm.world import World

RECIPE = "recipe.yaml"
RUN = "run.json"
METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"


class RunDirectory:
    """Paths of a run's files and the writing to them. Rank 0 writes all but the records of samples."""

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.world = world
        self.checkpoints = path / "checkpoints"
        self._samples = path / "samples" / f"rank-{world.rank}.jsonl"

    @property
    def is_started(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / RECIPE).exists()

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return next(reversed(complete_checkpoints(self.checkpoints).values()), None)

    def checkpoint_steps(self) -> list[int]:
        """After how many steps each complete checkpoint was written, oldest first."""
        return list(complete_checkpoints(self.checkpoints))

    def require_usable(self, *, resuming: bool) -> None:
        """Raise UserError when the folder cannot be written to, or holds another run that is not being resumed."""
        if self.is_started and not resuming:
            raise UserError(
                f"{self.path} already holds a run; go on with it by --resume auto, or choose another run=DIR"
            )
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run directory {self.path} is a file")
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"run directory {self.path} cannot be written: no permission on {parent}")
        foreign = [] if self.is_started or not self.path.exists() else sorted(p.name for p in self.path.iterdir())
        if foreign:
            raise UserError(f"run directory {self.path} is not empty and holds no run (found {foreign[0]})")

    def start(self, recipe: dict[str, Any], facts: dict[str, Any]) -> None:
        """Make the folder and write the resolved recipe and the facts of this start. Collective."""
        if self.world.is_main:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                clear_unfinished(self.checkpoints)
                write_text(self.path / RUN, json.dumps(facts, indent=2))
                write_text(self.path / RECIPE, yaml.safe_dump(recipe, sort_keys=False))
            except OSError as error:
                raise UserError(f"run directory {self.path} cannot be written: {error.strerror}") from None
        self.world.barrier()

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe that the run was started with."""
        return yaml.safe_load((self.path / RECIPE).read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def cut_back(self, step: int) -> None:
        """Drop all lines written after `step`, and torn last lines; tensorboard has its own purge. Collective."""
        if self.world.is_main:
            records = sorted((self.path / "samples").glob("rank-*.jsonl"))
            for path in [self.path / METRICS, self.path / LEDGER, *records]:
                if path.exists():
                    write_text(path, "".join(line for line in _whole_lines(path) if json.loads(line)["step"] <= step))
        self.world.barrier()

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Append one line of metrics (rank 0)."""
        if self.world.is_main:
            _append(self.path / METRICS, [metrics])

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics so far, without a torn last one."""
        path = self.path / METRICS
        return [json.loads(line) for line in _whole_lines(path)] if path.exists() else []

    def num_skips(self) -> int:
        """How many skips the ledger holds."""
        path = self.path / LEDGER
        return len(_whole_lines(path)) if path.exists() else 0

    def log_skips(self, step: int, skips: list[Skip]) -> list[Skip]:
        """Append what all ranks skipped since the last call, and return it. Collective."""
        everyone = [skip for rank in self.world.gather_objects(skips) for skip in rank]
        if self.world.is_main and everyone:
            _append(self.path / LEDGER, [{"step": step, **vars(skip)} for skip in everyone])
        return everyone

    def record_samples(self, step: int, batch: Batch) -> None:
        """Append the keys that this rank trained on in `step`."""
        self._samples.parent.mkdir(exist_ok=True)
        _append(self._samples, [{"step": step, "keys": list(batch.keys)}])


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return lines
