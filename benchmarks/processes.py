"""Measurements in processes of their own, asked for one at a time, so that two systems can take turns on one core."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil


class Measurer:
    """A module that `serve`s in a process of its own, with `path` before everything else that it imports."""

    def __init__(self, module: str, path: Path | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if path is not None:
            environment["PYTHONPATH"] = os.pathsep.join((str(path), str(Path(__file__).resolve().parents[1])))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def ask(self, cores: Sequence[int], **request: Any) -> Any:
        """The value of the module's function for these arguments, measured on these cores alone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"cores": list(cores), **request}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(map(str, self._process.args))} ended")  # type: ignore[arg-type]
        return json.loads(line)

    def __enter__(self) -> "Measurer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Clock:
    """Time since it was made: on the wall, and on the processors, by this process and its children that live."""

    def __init__(self) -> None:
        self._began = self._now()

    def seconds(self) -> dict[str, float]:
        """`wall` and `cpu`."""
        wall, cpu = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return {"wall": wall, "cpu": cpu}

    @staticmethod
    def _now() -> tuple[float, float]:
        here = psutil.Process()
        used = [process.cpu_times() for process in (here, *here.children())]
        return time.perf_counter(), sum(one.user + one.system for one in used)


def apart(module: str, what: str, argument: Any) -> Any:
    """The answer of a fresh process of a script, which is asked for it by `--ask`."""
    command = [sys.executable, "-P", "-m", module, "--ask", json.dumps([what, argument])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def peak_above(work: Callable[[], Any]) -> float:
    """By how many MB the peak of this process's memory rises above what it holds before the work."""
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    work()
    highest = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return (int(highest) * 1024 - before) / 1e6


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests on standard input until it ends: what to run, on which cores, with which arguments."""
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to standard error
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        os.sched_setaffinity(0, request.pop("cores"))
        print(json.dumps(functions[request.pop("what")](**request)), file=answers, flush=True)
