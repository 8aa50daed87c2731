"""`vlm` commands in processes of their own, as a launcher starts them; what each said, and how it ended."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from launch.main import run
from tests.ranks import _CONTEXT, free_port


@dataclass
class Life:
    """One process, whose standard error is kept in a file."""

    process: ForkServerProcess
    errors: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self, seconds: float) -> int | None:
        """The exit code, minus a signal's number; None when it is still there after that time."""
        self.process.join(seconds)
        return self.process.exitcode

    @property
    def said(self) -> list[str]:
        """The lines on standard error."""
        return self.errors.read_text().splitlines()


def start_command(
    arguments: Sequence[str],
    errors: Path,
    environment: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Life:
    """Begin `vlm` with these arguments, torch being loaded; `before` is called in the new process first."""
    process = _CONTEXT.Process(
        target=_live, args=(list(arguments), str(errors), environment or {}, before), daemon=False
    )
    process.start()
    return Life(process, errors)


def start_ranks(
    size: int, arguments: Sequence[str], errors: Path, before: Callable[[], None] | None = None
) -> list[Life]:
    """Begin `vlm` on so many ranks of this machine; the files of their errors are `errors` and the rank.

    `before` is called first in each of the new processes.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [
        start_command(
            arguments,
            errors.with_suffix(f".{rank}"),
            {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)},
            before,
        )
        for rank in range(size)
    ]


def end_all(lives: Sequence[Life]) -> None:
    """Kill what is left."""
    for life in lives:
        if life.process.exitcode is None:
            life.process.kill()
        life.process.join()


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Look again and again until it is so."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"not so after {seconds} s")
        time.sleep(0.005)


def num_lines(path: Path) -> int:
    """How many whole lines a file has; none where it is missing."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _live(arguments: list[str], errors: str, environment: dict[str, str], before: Callable[[], None] | None) -> None:
    import torch

    if before is not None:
        before()
    target = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)  # others add their lines
    os.dup2(target, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.argv = ["vlm", *arguments]
    run()
