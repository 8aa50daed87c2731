"""Wrong inputs to all commands: whether each ends in one line, soon, with nothing half written.

    python -P -m benchmarks.robustness.wrong_inputs [FOLDER] [--count 600] [--seed 0] [--show KIND]

Inputs are drawn by kind from the seed. Each runs in a process of its own, forked after one import of everything. What
is not wrong after all (a value that can be meant) may succeed. Finished ones stay in FOLDER/results.jsonl, and a script
that was stopped goes on where it was.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.robustness.wrong_input_cases import Case, Fixtures, cases

LIMIT, KILLED = 20.0, 60.0  # seconds: too long, and given up
_UNEXPECTED = re.compile(r"Traceback \(most recent call last\)|^vlm: .*\(\w+\.py:\d+\)", re.MULTILINE)
_RECORDS = {"failures.jsonl", "build-ledger.jsonl"}  # left on purpose: they say what became of the rest
_LINES = re.compile(r"^vlm: ", re.MULTILINE)


def main() -> None:
    """Run what is not there yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/wrong-inputs"))
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="also print every fault that was found")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    fixtures = Fixtures(folder / "fixtures")
    fixtures.make()
    results = folder / "results.jsonl"
    done = (
        {line["number"]: line for line in map(json.loads, results.read_text().splitlines())} if results.exists() else {}
    )
    warm_up()
    for number, make in enumerate(cases(arguments.count, arguments.seed, fixtures, folder / "work")):
        if number not in done:
            shutil.rmtree(folder / "work" / f"{number:04d}", ignore_errors=True)
            done[number] = {"number": number, **judged(make(), folder)}
            with results.open("a") as file:
                file.write(json.dumps(done[number]) + "\n")
    print_table([done[number] for number in sorted(done) if number < arguments.count], show=arguments.show)


def warm_up() -> None:
    """Import all that commands import, so that a fork finds it."""
    import launch.build_shards
    import launch.demo
    import launch.evaluate
    import launch.export
    import launch.filter_shards
    import launch.index_shards
    import launch.main
    import launch.scenes
    import launch.train
    import launch.verify_gradients  # noqa: F401


def judged(case: Case, folder: Path) -> dict[str, Any]:
    """The outcome of one case."""
    said = folder / "said.txt"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        run_here(case, said)
    status = wait(child, began)
    seconds = time.monotonic() - began
    text = said.read_text(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    faults = []
    if _UNEXPECTED.search(text) or code not in (0, 1, 2):
        faults.append("traceback")
    if seconds > LIMIT:
        faults.append("long")
    if code == 2 and len(_LINES.findall(text)) != 1:
        faults.append("not one line")
    if code != 0 and half_written(case.out):
        faults.append("half written")
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text):
        faults.append("control characters")
    shutil.rmtree(case.out.parent, ignore_errors=True)
    return {
        "kind": case.kind,
        "words": [word[:300] for word in case.words],
        "code": code,
        "seconds": round(seconds, 2),
        "faults": faults,
        "said": text[-1500:],
    }


def run_here(case: Case, said: Path) -> None:
    """In the child: the command line, with what it says in a file."""
    os.setsid()
    target = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(case.out.parent)
    sys.argv = ["vlm", *case.words]
    code = 70
    try:
        from launch.main import run

        run()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, began: float) -> int:
    """The exit status of the child, which is killed with all its own when it takes too long."""
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        if time.monotonic() - began > KILLED:
            os.killpg(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.01)


def half_written(out: Path) -> bool:
    """Whether files lie where a refused command would have written; a run that stopped later says so in its record."""
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out] if out.exists() else []
    return bool(files) and not _RECORDS.intersection(path.name for path in files)


def print_table(results: list[dict[str, Any]], *, show: bool) -> None:
    """Counts by kind."""
    kinds = defaultdict(list)
    for result in results:
        kinds[result["kind"]].append(result)
    print("| kind | inputs | refused | taken | tracebacks | over 20 s | not one line | half written | longest, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind, found in [*kinds.items(), ("all", results)]:
        faults = [fault for result in found for fault in result["faults"]]
        counts = [faults.count(fault) for fault in ("traceback", "long", "not one line", "half written")]
        taken = sum(result["code"] == 0 for result in found)
        longest = max(result["seconds"] for result in found)
        cells = [kind, len(found), len(found) - taken, taken, *counts, f"{longest:.1f}"]
        print(f"| {' | '.join(map(str, cells))} |")
    for result in results if show else []:
        if result["faults"]:
            print(
                "\n", result["number"], result["faults"], result["code"], result["seconds"], " ".join(result["words"])
            )
            print(result["said"][-600:])


if __name__ == "__main__":
    main()
