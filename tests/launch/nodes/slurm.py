"""Slurm on this machine, as far as one job sees it: its programs on a PATH, and what a cluster does to a job."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from tests.launch.lives import wait_until
from tests.launch.nodes import slurm_programs


class StandIn:
    """Programs in `folder`, which goes on a PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._state = folder / "state"
        self._state.mkdir()
        for name in ("sbatch", "srun", "scontrol"):
            words = [sys.executable, "-IS", slurm_programs.__file__, str(self._state), name]
            (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            (folder / name).chmod(0o755)

    @property
    def number(self) -> str:
        """The number of the one job."""
        (path,) = self._state.glob("*.json")
        return path.stem

    def job(self) -> dict[str, Any]:
        """What is known of the job."""
        return dict(json.loads((self._state / f"{self.number}.json").read_text()))

    def warn(self) -> None:
        """The end of the time is near: the signal that the job asked for goes where it asked for it."""
        job = self.job()
        whom, colon, rest = job["options"]["signal"].partition(":")
        number = signal.Signals[f"SIG{(rest if colon else whom).partition('@')[0]}"]
        if colon and "B" in whom:
            os.kill(job["script"], number)
        else:
            slurm_programs.signal_step(job["tasks"], number)

    def pre_empt(self) -> None:
        """The nodes are another's now: script and steps are to end, and the job is queued again."""
        job = self.job()
        slurm_programs.Job(self._state, self.number).set(requeue="requeue" in job["options"])
        slurm_programs.signal_step([job["script"], *job["tasks"]], signal.SIGTERM)

    def ended(self) -> dict[str, Any]:
        """The job when it has ended for good."""
        wait_until(lambda: self.job().get("state") in ("COMPLETED", "FAILED"))
        return self.job()

    def end(self) -> None:
        """Kill what is left of the job."""
        job = self.job() if list(self._state.glob("*.json")) else {}
        for pid in (job.get("script"), *job.get("tasks", ())):
            try:
                if pid is not None and job["state"] == "RUNNING":
                    os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
