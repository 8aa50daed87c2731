"""Time from `vlm train` to its first line and to its first step, on indexed scenes.

    python -P -m benchmarks.launch.start [--turns 5]

Each turn is a process of its own, and a run directory of its own; what the command says is read as it comes. The shards
are indexed before, and have been read once: a start reads one manifest.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.result_cache import machine

MOMENTS = {"first line": "vlm ", "data is read": "data ", "first step": "step 1/"}
"""What a start comes to, by the beginning of the line that tells of it."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "vlm", *arguments]


def start(data: Path, run: Path) -> dict[str, float]:
    """Seconds from the start of the command to each of its moments."""
    keys = [f"data.root={data}", f"run={run}", "trackers=[]"]
    began = time.perf_counter()
    process = subprocess.Popen(command("train", "scenes", *keys), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seconds: dict[str, float] = {}
    try:
        for line in process.stdout:
            for moment, beginning in MOMENTS.items():
                if line.startswith(beginning):
                    seconds.setdefault(moment, time.perf_counter() - began)
            if "first step" in seconds:
                break
    finally:
        process.kill()
        process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "scenes"
        subprocess.run(command("data", "scenes", str(data), "--train", "2000", "--val", "200"), check=True)
        subprocess.run(command("data", "index", str(data / "*.tar")), check=True, stdout=subprocess.DEVNULL)
        taken = [start(data, Path(folder) / f"run-{turn}") for turn in range(turns)]
    for moment in MOMENTS:
        seconds = [one[moment] for one in taken if moment in one]
        if seconds:
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            print(f"{moment:<14} {statistics.median(seconds):.2f} s ({spread}; {len(seconds)} turns)")


if __name__ == "__main__":
    main()
