"""Correctness, throughput and memory on one GPU, within five minutes, without network: checks first, then figures.

    python -P -m benchmarks.gpu.everything [--device cuda] [--seconds 300] [--out FILE] [--only PART ...]
    python -P -m benchmarks.gpu.everything --device cpu --quick
    python -P -m benchmarks.gpu.everything --wheels DIR

`python -P -m benchmarks.gpu` is the same. Each part runs in another process, which a fresh one follows where a part
fails or takes too long; what there is no time for is skipped aloud. Exit code 1 where a check has not passed. Parts:
the checks (towers, tiles, kernels, bf16, group, copies, resume), then steps, losses, compiled.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import CHECK_HEAD, check_lines, loss_table, machine_line, step_table
from benchmarks.gpu.wheels import gather_wheels
from benchmarks.gpu.worker import Answer, Worker

# The checks' names are those of `benchmarks.gpu.checks`, which this process does without: it imports no torch.
CHECK_NAMES = ("towers", "tiles", "kernels", "bf16", "group", "copies", "resume")
PARTS = (*CHECK_NAMES, "steps", "losses", "compiled")
_CHECK_SECONDS = 90.0
_ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "TRITON_INTERPRET": "1"}
_MODELS: Mapping[str, tuple[str, Sequence[int]]] = {  # batches from the largest on, until one has room
    "b32": ("ViT-B/32", (1024, 512, 256, 128, 64)),
    "b16": ("ViT-B/16", (512, 256, 128, 64, 32)),
}
_TINY: Mapping[str, tuple[str, Sequence[int]]] = {"tiny": ("a tiny model", (8,))}
_PAIRS = (16_384, 32_768, 65_536, 131_072)


class Session:
    """The parts that are asked for, one after the other, until the time is over."""

    def __init__(self, worker: Worker, device: str, quick: bool, seconds: float) -> None:
        self._worker = worker
        self._setting = {"device": device, "quick": quick}
        self._until = time.perf_counter() + seconds
        self.failed = False

    def ask(self, place: str, most: float, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """A part's answer as plain values, within `most` seconds and what is left."""
        left = self._until - time.perf_counter()
        if left < 1:
            answer = Answer(None, "skipped: the time is over", 0.0)
        else:
            answer = self._worker.ask(f"benchmarks.gpu.{place}", {**self._setting, **arguments}, min(most, left))
        return vars(answer).copy()

    def checks(self, names: Sequence[str]) -> dict[str, Any]:
        """What the checks found."""
        found = {}
        print(f"\n{CHECK_HEAD}")
        for name in names:
            one = found[name] = self.ask("checks:run_check", _CHECK_SECONDS, {"name": name})
            self.failed |= one["problem"] is not None or not all(line["passed"] for line in one["value"]["lines"])
            print(check_lines(name, one), flush=True)
        return found

    def steps(self, ways: Sequence[str], most: float, peak: float | None) -> dict[str, Any]:
        """The steps of each model."""
        found = {}
        for model, (title, sizes) in (_TINY if self._setting["quick"] else _MODELS).items():
            asked = {"model": model, "sizes": sizes, "ways": ways, "seconds": most / 2}
            one = found[model] = self.ask("steps:measure_steps", most, asked)
            print(f"\n{step_table(title, one, peak)}", flush=True)
        return found

    def losses(self) -> dict[int, Any]:
        """The losses by number of pairs."""
        found = {}
        for pairs in (64, 128) if self._setting["quick"] else _PAIRS:
            found[pairs] = self.ask("losses:measure_losses", 30.0, {"pairs": pairs, "seconds": 20.0})
        print(f"\n{loss_table(found)}", flush=True)
        return found


def run(session: Session, parts: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What each kind of part found, by name, printed as it comes."""
    machine = session.ask("machine:describe", 60.0, {})
    yield "machine", machine
    if machine["problem"] is not None:
        session.failed = True
        print(machine["problem"])
        return
    peak = machine["value"]["peak"]
    print(machine_line(machine["value"]), flush=True)
    yield "checks", session.checks([name for name in CHECK_NAMES if name in parts])
    if "steps" in parts:
        yield "steps", session.steps(("vlm", "open_clip"), 40.0, peak)
    if "losses" in parts:
        yield "losses", session.losses()
    if "compiled" in parts:  # last: compiling takes longest
        yield "compiled", session.steps(("vlm", "vlm, compiled", "open_clip, compiled"), 100.0, peak)


def main() -> None:
    """Run what is asked for, print it, and write it where that is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on which no figure says anything")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which nothing more is begun")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, help="a JSON file for all that was found")
    parser.add_argument("--wheels", type=Path, help="download what this needs beside torch into a folder, and end")
    arguments = parser.parse_args()
    if arguments.wheels is not None:
        sys.exit(gather_wheels(arguments.wheels))
    began = time.perf_counter()
    environment = _ON_CPU if arguments.device == "cpu" else {}
    with Worker(environment, ("benchmarks.gpu.checks", "benchmarks.gpu.steps", "benchmarks.gpu.losses")) as worker:
        session = Session(worker, arguments.device, arguments.quick, arguments.seconds)
        found = dict(run(session, arguments.only))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    verdict = "a check has FAILED" if session.failed else "all checks passed"
    print(f"\n{verdict}; {time.perf_counter() - began:.0f} s")
    sys.exit(1 if session.failed else 0)


if __name__ == "__main__":
    main()
