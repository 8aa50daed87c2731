"""The folder of a run: what it is, what it measured, what it skipped; appended to as it goes, cut back on resume."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vlm.atomic import write_text
from vlm.batch import DOCUMENTS, Batch, Skip
from vlm.checkpoint.folder import adopt, clear_unfinished, complete_checkpoints, move
from vlm.distributed.world import World
from vlm.ends.failures import FAILURES, Failures
from vlm.errors import EveryRankError, UserError, reason
from vlm.json_lines import read_lines, sealed_line
from vlm.sealed import read_yaml_mapping, sealed_json, sealed_yaml
from vlm.training.history import HISTORY, History
from vlm.training.owner import OWNER, Owner
from vlm.training.run_files import CHECKPOINTS, LEDGER, METRICS, RECIPE, RUN, SAMPLES, SET_ASIDE, SUBSTITUTIONS

# What a start leaves that came to no first step, in a folder that may be begun in again.
_OF_A_START = {
    CHECKPOINTS,
    RUN,
    RECIPE,
    METRICS,
    LEDGER,
    OWNER,
    HISTORY,
    FAILURES,
    SAMPLES,
    SUBSTITUTIONS,
    "tensorboard",
}
Result = TypeVar("Result")


class RunDirectory:
    """Paths of a run's files and the writing to them. Rank 0 writes all but the records of samples."""

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.world = world
        self.checkpoints = path / CHECKPOINTS
        self.history = History(path)
        self._owner = Owner(path)
        self.was_started = False  # a run was there when it was claimed, as rank 0 saw it
        # Completes the checkpoint that is being written, if one is; collective. Who writes them puts it here.
        self.settle: Callable[[], None] = lambda: None
        # Told the step of each checkpoint that is complete, on rank 0.
        self.saved: Callable[[int], None] = lambda _: None
        self._samples = path / SAMPLES / f"rank-{world.rank}.jsonl"

    @property
    def is_started(self) -> bool:
        """Whether a run has been begun here, and has come to its first step or was not begun by this program."""
        has_facts = (self.path / RUN).exists()
        return (self.path / RECIPE).exists() and (not has_facts or self._has_work())

    def _has_work(self) -> bool:
        metrics = self.path / METRICS
        return (metrics.exists() and metrics.stat().st_size > 0) or bool(complete_checkpoints(self.checkpoints))

    def checkpoint_steps(self) -> list[int]:
        """After how many steps each complete checkpoint was written, oldest first."""
        return list(complete_checkpoints(self.checkpoints))

    def complete_checkpoints(self) -> list[Path]:
        """All complete checkpoints, oldest first, as rank 0 sees them; one being written is waited for. Collective."""
        self.settle()
        return self._agreed(lambda: list(complete_checkpoints(self.checkpoints).values()))

    def last_saved(self) -> int | None:
        """After how many steps the run last had a checkpoint, as its history tells. Collective."""
        return self._agreed(self.history.last_saved)

    def claim(self, *, resuming: bool) -> str | None:
        """Own the folder for this process, where it is there already; a line on an owner that has ended. Collective.

        Raises:
            EveryRankError: the folder cannot be written to, holds other things or another run that is not being
                resumed, or belongs to another process.
        """
        notice, self.was_started = self._agreed(lambda: self._claim(resuming))
        return notice

    def release(self) -> None:
        """Let other processes have the folder."""
        if self.world.is_main:
            self._owner.release()

    def _claim(self, resuming: bool) -> tuple[str | None, bool]:
        self._require_usable()
        notice = self._take() if self.path.exists() else None
        if self.is_started and not resuming:
            self._owner.release()
            raise UserError(
                f"{self.path} already holds a run; go on with it by --resume auto, or choose another run=DIR"
            )
        return notice, self.is_started

    def _take(self) -> str | None:
        notice = self._owner.take()
        if notice is None:
            return None
        Failures(self.path, self.world.rank).add("taken-over", notice)
        return f"{self.path}: {notice}"

    def _require_usable(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run directory {self.path} is a file")
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"run directory {self.path} cannot be written: no permission on {parent}")
        if self.is_started or not self.path.exists():
            return
        foreign = sorted(entry.name for entry in self.path.iterdir() if not _is_of_a_start(entry.name))
        if foreign:
            raise UserError(f"run directory {self.path} is not empty and holds no run (found {foreign[0]})")
        if self._has_work():
            raise UserError(
                f"run directory {self.path} holds the work of a run but no {RECIPE}; put that back, or go on elsewhere "
                f"by run=DIR --resume {self.checkpoints}/step-N"
            )

    def start(
        self, recipe: dict[str, Any], facts: dict[str, Any], step: int = 0, checkpoint: Path | None = None
    ) -> list[str]:
        """Make and own the folder, and write the resolved recipe and the facts of this start. Collective.

        A run that goes on from an earlier step than it once came to leaves that way: later checkpoints, and a copy of
        what was logged, are set aside. A checkpoint from elsewhere becomes this run's own. Returns lines on it.

        Raises:
            EveryRankError: the folder cannot be written to, or another process has begun a run there.
        """
        return self._agreed(lambda: self._start(recipe, facts, step, checkpoint))

    def _start(self, recipe: dict[str, Any], facts: dict[str, Any], step: int, checkpoint: Path | None) -> list[str]:
        self.path.mkdir(parents=True, exist_ok=True)
        notice = self._take()
        if self.is_started and not self.was_started:
            raise UserError(f"{self.path}: another process has begun a run there meanwhile")
        self.checkpoints.mkdir(exist_ok=True)
        clear_unfinished(self.checkpoints)
        for left in self.path.glob(".*.partial"):
            left.unlink()
        self.history.mend()
        lines = [notice] if notice else []
        lines += self._leave(step, checkpoint)
        if checkpoint is not None:
            adopt(checkpoint, step, self.checkpoints)
        write_text(self.path / RUN, sealed_json(facts))
        write_text(self.path / RECIPE, sealed_yaml(yaml.safe_dump(recipe, sort_keys=False)))
        self.history.add("resumed" if self.was_started or checkpoint else "began", step)
        return lines

    def _leave(self, step: int, checkpoint: Path | None) -> list[str]:
        """Set aside the checkpoints of a way that the run does not go on, with what was logged on it."""
        left = {
            saved: path
            for saved, path in complete_checkpoints(self.checkpoints).items()
            if saved > step or (saved == step and checkpoint is not None and not path.samefile(checkpoint))
        }
        unknown = checkpoint is None and self._has_work() and not self.history.path.exists()
        if not left and not unknown:
            return []
        place = self.path / SET_ASIDE
        number = 1 + max((int(one.name) for one in place.glob("*") if one.name.isdecimal()), default=0)
        into = place / str(number)
        into.mkdir(parents=True)
        for name in (METRICS, LEDGER):
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, into / name)
        move(list(left.values()), into)
        self.history.add("set_aside", step, steps=list(left), folder=str(into.relative_to(self.path)))
        if not left:
            return [f"going on from step {step}: what was logged until now lies in {into} now"]
        steps = ", ".join(map(str, left))
        return [f"going on from step {step}: the checkpoints of steps {steps} and the log until then lie in {into} now"]

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe that the run was started with. Raises EveryRankError when it is damaged. Collective."""
        return self._agreed(lambda: read_yaml_mapping(self.path / RECIPE))

    def require_undamaged(self) -> None:
        """Raise UserError when a file that a resumed run goes on writing to is damaged (rank 0 looks). Collective."""
        self._agreed(self._require_undamaged)

    def _require_undamaged(self) -> None:
        for path in (*self._logs(), self.history.path):
            read_lines(path)

    def _logs(self) -> list[Path]:
        return [self.path / METRICS, self.path / LEDGER, *sorted((self.path / SAMPLES).glob("rank-*.jsonl"))]

    def truncate_after(self, step: int) -> list[str]:
        """Drop all lines written after `step`, and torn last lines, of which it tells. Collective.

        Tensorboard has its own purge.
        """
        return self._agreed(lambda: self._truncate_after(step))

    def _truncate_after(self, step: int) -> list[str]:
        notices = []
        for path in self._logs():
            if path.exists():
                records, torn = read_lines(path)
                remaining = [sealed_line(record) for record in records if record["step"] <= step]
                write_text(path, "".join(remaining))
                if torn:
                    notices.append(f"{path}: the last line was torn, and is left out")
        return notices

    def _agreed(self, do: Callable[[], Result]) -> Result:
        """The finding of rank 0 on every rank; what it cannot do is raised on every rank."""
        result: Result | None = None
        problem = None
        if self.world.is_main:
            try:
                result = do()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"run directory {self.path} cannot be written: {error.strerror or reason(error)}"
        (result, problem), *_ = self.world.gather_objects((result, problem))
        if problem is not None:
            raise EveryRankError(problem)
        return result

    def drop_evaluations(self, step: int, names: Sequence[str]) -> None:
        """Drop what the evaluations of that step, which are to be run again, have written. Collective."""
        self._agreed(lambda: self._drop_evaluations(step, names))

    def _drop_evaluations(self, step: int, names: Sequence[str]) -> None:
        again = tuple(f"eval/{name}/" for name in names)
        lines = self.metrics() if names else []
        # They are the last of their step, with the alarms that they raised.
        is_dropped = [line["step"] == step and any(key.startswith(again) for key in line) for line in lines]
        if any(is_dropped):
            remaining = lines[: is_dropped.index(True)]
            write_text(self.path / METRICS, "".join(map(sealed_line, remaining)))
        sources = [f"evaluate:{name}" for name in names]
        skips = read_lines(self.path / LEDGER).records if names else []
        remaining_skips = [line for line in skips if line["step"] != step or line.get("source") not in sources]
        if len(remaining_skips) < len(skips):
            write_text(self.path / LEDGER, "".join(map(sealed_line, remaining_skips)))

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Append one line of metrics (rank 0)."""
        if self.world.is_main:
            _append(self.path / METRICS, [metrics])

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics so far, without a torn last one. Raises UserError when one is damaged."""
        return read_lines(self.path / METRICS).records

    def num_skips(self) -> int:
        """How many skips of training samples the ledger holds; those of evaluations are told apart by a colon."""
        records = read_lines(self.path / LEDGER).records
        return sum(":" not in str(record.get("source")) for record in records)

    def log_skips(self, skips: list[tuple[int, Skip]]) -> list[Skip]:
        """Append what all ranks skipped since the last call, each in its step, and return it. Collective.

        The lines are by step, then by rank: the same however often this is called.
        """
        everyone = [entry for rank in self.world.gather_objects(skips) for entry in rank]
        everyone.sort(key=lambda entry: entry[0])
        if self.world.is_main and everyone:
            _append(self.path / LEDGER, [{"step": step, **vars(skip)} for step, skip in everyone])
        return [skip for _, skip in everyone]

    def record_samples(self, step: int, batch: Batch) -> None:
        """Append the keys that this rank trained on in `step`."""
        self._samples.parent.mkdir(exist_ok=True)
        documents = {"documents": list(batch.document_keys)} if DOCUMENTS in batch.parts else {}
        _append(self._samples, [{"step": step, "keys": list(batch.keys), **documents}])


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(sealed_line, records))


def _is_of_a_start(name: str) -> bool:
    return name in _OF_A_START or (name.startswith(".") and name.endswith(".partial"))
