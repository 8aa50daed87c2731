"""Time by which the ranks of a run outlive one that fails, is killed, or is stopped; and the lines that they end with.

    python -P -m benchmarks.robustness.lost_ranks [FOLDER] [--again]

Real ranks of a tiny model with `patience: 5`, on this machine; as root also two network namespaces whose link is cut.
Each row is one trial: all other ranks must have ended with one line that names the one that was lost. Finished trials
stay in FOLDER.
"""

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil

from benchmarks.result_cache import ResultCache, machine
from tests.launch.lives import Life, end_all, num_lines, start_command, start_ranks, wait_until
from tests.launch.tiny import write_tiny, write_tiny_recipe

PATIENCE = 5.0
LIMIT = {"failed": 15.0, "killed": 15.0, "stopped": 15.0, "cut off": PATIENCE + 10}
TRIALS = [(how, size, victim) for how in ("failed", "killed", "stopped") for size in (2, 4) for victim in (0, size - 1)]
LEFT, RIGHT = "vlm-left", "vlm-right"


def main() -> None:
    """Run what is not there yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/lost-ranks"))
    parser.add_argument("--again", action="store_true", help="drop the trials of earlier runs")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # as `vlm` does before it loads torch
    results = ResultCache(folder, "trials", arguments.again)
    if not (folder / "data").exists():
        write_tiny(folder / "data-new")
        (folder / "data-new").rename(folder / "data")
    print(f"{machine()}\n")
    print("| what | ranks | lost | the others' exit codes | all ended after | right lines |\n|---|---|---|---|---|---|")
    for how, size, victim in TRIALS:
        name = f"{how} {victim} of {size}"
        show(
            how,
            size,
            victim,
            *results(name, partial(trial, folder, how, size, victim)),
        )
    if os.geteuid() == 0 and shutil.which("ip"):
        show("cut off", 2, 1, *results("cut off", lambda: cut_off(folder)))


def show(how: str, size: int, victim: int, codes: list[int | None], seconds: float, right: int) -> None:
    """One row; what is not as promised is said."""
    asked = size if how in ("failed", "cut off") else size - 1
    late = "" if seconds < LIMIT[how] else f" (more than {LIMIT[how]:.0f} s)"
    told = ", ".join(map(str, codes))
    print(f"| {how} | {size} | rank {victim} | {told} | {seconds:.1f} s{late} | {right} of {asked} |", flush=True)


def recipe_of(folder: Path) -> tuple[str, Path]:
    """A recipe for a run that does not end by itself, and where it runs."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    loading = {"workers": 1, "patience": PATIENCE, "max_bad_share": 1}
    changes = {"duration": "1000000 steps", "checkpoint_every": "1000000 steps", "record_samples": False}
    return write_tiny_recipe(folder / "data", run, **changes, data=loading), run


def trial(folder: Path, how: str, size: int, victim: int) -> tuple[list[int | None], float, int]:
    """Exit codes of the others, seconds until the last had ended, and how many ended with the one right line."""
    recipe, run = recipe_of(folder)
    lives = start_ranks(size, ["train", recipe], folder / "errors")
    try:
        wait_until(lambda: num_lines(run / "metrics.jsonl") > 5, 300)
        began = time.monotonic()
        hit(lives[victim], how)
        others = lives if how == "failed" else [life for life in lives if life is not lives[victim]]
        return outcome(others, began, f"rank {victim} ", lives[victim])
    finally:
        end_all(lives)


def hit(life: Life, how: str) -> None:
    """Let something happen to a rank: its loading process is killed, or itself is killed or stopped."""
    if how == "failed":
        psutil.Process(life.pid).children()[0].kill()
    else:
        life.signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)


def outcome(others: Sequence[Life], began: float, named: str, failed: Life) -> tuple[list[int | None], float, int]:
    """See `trial`; the rank that failed says in its own line what happened to it."""
    codes = [life.ended(max(0.1, began + 120 - time.monotonic())) for life in others]
    seconds = time.monotonic() - began
    right = 0
    for life in others:
        own = "loading worker 0 died" if life is failed else named
        right += len(life.said) == 1 and own in life.said[0]
    return codes, seconds, right


def enter(space: str) -> None:
    """Put this process into a network namespace."""
    with Path(f"/var/run/netns/{space}").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"no way into {space}")


def cut_off(folder: Path) -> tuple[list[int | None], float, int]:
    """Two ranks in network namespaces of their own, joined by a link that is taken down."""
    recipe, run = recipe_of(folder)
    commands = [
        f"ip netns add {LEFT}",
        f"ip netns add {RIGHT}",
        f"ip link add va netns {LEFT} type veth peer name vb netns {RIGHT}",
        f"ip -n {LEFT} addr add 10.77.0.1/24 dev va",
        f"ip -n {RIGHT} addr add 10.77.0.2/24 dev vb",
        *(
            f"ip -n {space} link set {device} up"
            for space, device in ((LEFT, "va"), (RIGHT, "vb"), (LEFT, "lo"), (RIGHT, "lo"))
        ),
    ]
    lives: list[Life] = []
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        for rank, (space, device) in enumerate(((LEFT, "va"), (RIGHT, "vb"))):
            place = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29655", "WORLD_SIZE": "2", "RANK": str(rank)}
            place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": device}
            lives.append(start_command(["train", recipe], folder / f"errors.{rank}", place, partial(enter, space)))
        wait_until(lambda: num_lines(run / "metrics.jsonl") > 5, 300)
        began = time.monotonic()
        subprocess.run(["ip", "-n", LEFT, "link", "set", "va", "down"], check=True)
        codes = [life.ended(max(0.1, began + 120 - time.monotonic())) for life in lives]
        seconds = time.monotonic() - began
        right = sum(len(life.said) == 1 and f"rank {1 - rank} " in life.said[0] for rank, life in enumerate(lives))
        return codes, seconds, right
    finally:
        end_all(lives)
        for space in (LEFT, RIGHT):
            subprocess.run(["ip", "netns", "delete", space], check=False)


if __name__ == "__main__":
    main()
