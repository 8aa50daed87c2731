"""Work shared among the tasks of a Slurm array."""

import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from data.pools.base import Job, Pool, PoolOptions, Result
from data.pools.coordinator import Coordinator
from data.pools.remote import environment
from vlm.errors import UserError, reason

_WORKERS = 8
_LOOK_EVERY = 15.0  # seconds between two looks at the queue
_LOOKS = 2  # in a row that find nothing before the array counts as ended
_ANSWER_WITHIN = 60.0  # seconds, of Slurm's commands


class SlurmPool(Pool):
    """An array of `workers` tasks that fetch their jobs from this process, and a job again that one of them lost.

    A task that Slurm takes back is queued anew and goes on with other jobs. `sbatch` are further options of that
    command (`partition=cpu`). All nodes need the same files under the same paths, and reach this machine by its
    name. What the workers print lies in a folder of the current one, which goes when all is well.

    Raises:
        UserError: sbatch is not there, or refuses.
    """

    def __init__(self, workers: int | None = None, sbatch: tuple[str, ...] = (), host: str | None = None) -> None:
        host = _name_of_this_machine() if host is None else host
        self._workers = _WORKERS if workers is None else workers
        self._folder = Path(tempfile.mkdtemp(prefix="vlm-workers-", dir=Path.cwd()))
        key = secrets.token_hex(32)
        key_file = self._folder / "key"
        key_file.touch(mode=0o600)
        key_file.write_text(key)
        self._coordinator = Coordinator(key.encode())
        self._has_failed = False
        self._end = threading.Event()
        address = f"{host}:{self._coordinator.port}"
        script = self._folder / "worker.sh"
        script.write_text(worker_script(address, key_file))
        self._array = self._submit_array(script, sbatch)
        threading.Thread(target=self._watch, daemon=True).start()

    @classmethod
    def start(cls, options: PoolOptions) -> "SlurmPool":
        """As of any pool."""
        return cls(options.workers, options.sbatch)

    def num_workers(self) -> int:
        """The size of the array, whether its tasks run or wait."""
        return self._workers

    def submit(self, work: Callable[[Job], Result], job: Job) -> "Future[Result]":
        """As of any pool."""
        return self._coordinator.submit(work, job)

    def close(self) -> None:
        """As of any pool; tasks that still wait in the queue are cancelled."""
        self._end.set()
        self._coordinator.close()
        _slurm("scancel", "--quiet", self._array)
        if not self._has_failed:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _submit_array(self, script: Path, sbatch: tuple[str, ...]) -> str:
        options = (
            "--parsable",
            "--job-name=vlm-data",
            f"--array=0-{self._workers - 1}",
            "--cpus-per-task=1",
            "--requeue",
            "--open-mode=append",
            f"--output={self._folder}/worker-%a.log",
        )
        more = [f"--{word.removeprefix('--')}" for word in sbatch]
        submitted = _slurm("sbatch", *options, *more, str(script))
        if isinstance(submitted, UserError):
            self._coordinator.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise submitted
        return submitted.partition(";")[0].strip()

    def _watch(self) -> None:
        """Give up where Slurm knows no task of the array any more and none is connected."""
        looks = 0
        while not self._end.wait(_LOOK_EVERY):
            queued = _slurm("squeue", "--noheader", f"--jobs={self._array}")
            is_gone = isinstance(queued, UserError) or not queued.strip()
            looks = looks + 1 if is_gone and not self._coordinator.num_connected else 0
            if looks == _LOOKS:
                self._has_failed = True
                self._coordinator.fail(
                    UserError(
                        f"--on slurm: array {self._array} has ended with work left; {self._folder} has what its "
                        "tasks printed; start the same command again to go on"
                    )
                )
                return


def _name_of_this_machine() -> str:
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise UserError(f"--on slurm: no address is known of {name}, which this machine calls itself") from error
    return name


def worker_script(address: str, key: Path) -> str:
    """The script of one task of the array."""
    variables = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment().items())
    command = [sys.executable, "-P", "-m", "vlm", "data", "worker", address, "--key", str(key)]
    return f"#!/bin/bash\n{variables}cd {shlex.quote(os.getcwd())}\nexec {shlex.join(command)}\n"


def _slurm(*command: str) -> "str | UserError":
    """What one of Slurm's commands prints, or what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_WITHIN, check=False)
    except FileNotFoundError:
        return UserError(f"--on slurm: there is no {command[0]} on this machine; start the command where Slurm is")
    except (OSError, subprocess.TimeoutExpired) as error:
        return UserError(f"--on slurm: {command[0]}: {reason(error)}")
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        return UserError(f"--on slurm: {command[0]}: {words[-1]:.200}")
    return done.stdout
