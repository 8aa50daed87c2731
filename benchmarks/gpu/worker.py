"""A process that runs parts one at a time, so that one that fails, hangs or ends the process stops no other."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, Any

_ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    """What a part returned, or why it did not, in one line; and the seconds that it took."""

    value: Any
    problem: str | None
    seconds: float


class Worker:
    """Calls of functions in another process; after one that went wrong, or was too slow, in a fresh one.

    A GPU refuses all work of a process after some errors, so no process goes on after one. `modules` are imported at
    the start, which has a time of its own.
    """

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str] = ()) -> None:
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
        self._modules = modules
        self._process: subprocess.Popen[str] | None = None
        self._said: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker

    def ask(self, place: str, arguments: Mapping[str, Any], seconds: float) -> Answer:
        """The answer of a function by its place (`package.module:name`), which has so many seconds."""
        if self._process is None and (problem := self._start()) is not None:
            return Answer(None, problem, 0.0)
        began = time.perf_counter()
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # why it ended is told where its answer is read
            self._process.stdin.write(json.dumps([place, arguments]) + "\n")
            self._process.stdin.flush()
        value, problem = self._read(seconds)
        return Answer(value, problem, time.perf_counter() - began)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._end()
        self._said.close()

    def _start(self) -> str | None:
        """Start a process; why it could not be, in words."""
        self._said.seek(0)
        self._said.truncate()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.gpu.worker", *self._modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=self._environment,
            text=True,
        )
        _, problem = self._read(_START_SECONDS)
        return problem

    def _read(self, seconds: float) -> tuple[Any, str | None]:
        """The next answer, and why there is none; the process is ended then."""
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else ""
        value, problem = json.loads(line) if line else (None, f"not done in {seconds:.0f} s")
        if problem is not None:
            self._end()
        if ready and not line:
            problem = f"its process ended{self._last_words()}"
        return value, problem

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read().splitlines() if line.strip()]
        return f" ({lines[-1][:200]})" if lines else ""


def serve(modules: Sequence[str]) -> None:
    """Import modules, then answer the calls on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to standard error
    os.dup2(2, 1)
    for module in modules:
        import_module(module)
    print(json.dumps([None, None]), file=answers, flush=True)
    for line in sys.stdin:
        place, arguments = json.loads(line)
        module, _, name = place.partition(":")
        value, problem = None, None
        try:
            value = getattr(import_module(module), name)(**arguments)
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            problem = f"{type(error).__name__}: {said[0][:300]}"
        print(json.dumps([value, problem]), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
