"""Two machines for real: a run outlives a cut link, one lost node, one that comes back, and one that is taken away.

The whole chain under DDP; under ZeRO-2 and FSDP2 the cut, and both ways on after it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.resume import AUTO
from tests.launch.lives import num_lines, wait_until
from tests.launch.nodes.loaded import PACE, LoadedPrograms, loaded_programs
from tests.launch.nodes.machines import IP, Machine, no_machines, two_machines
from tests.launch.small import losses_of, metrics_of
from tests.launch.tiny import assert_same_run, sets_of, train_ranks, write_tiny, write_tiny_recipe

STEPS, SLOW, ALONE = 90, "0.4", "1.5"
SILENT = re.compile(
    r"vlm: (rank 1: )?rank [01] on .* has been silent for \d+ s \(data\.patience\): stopped, or cut off\?"
)


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    if reason := no_machines():
        pytest.skip(reason)
    with two_machines() as both:
        yield both


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[LoadedPrograms]:
    with loaded_programs(tmp_path / "bin") as programs:
        yield programs


class Chain:
    """A run on two nodes, and what is seen of it."""

    def __init__(
        self,
        folder: Path,
        machines: tuple[Machine, Machine],
        programs: LoadedPrograms,
        engine: str = "ddp",
        steps: int = STEPS,
    ) -> None:
        write_tiny(folder / "data")
        changes: dict[str, Any] = {"duration": f"{steps} steps", "checkpoint_every": "3 steps", "engine": engine}
        loading = {"workers": 1, "patience": 2.0, "max_bad_share": 1}
        self.recipes = {
            name: write_tiny_recipe(folder / "data", folder / name, **changes, data=loading)
            for name in ("whole", "run")
        }
        self.run = folder / "run"
        self.pace = folder / "pace"
        self.pace.write_text(SLOW)
        self.errors = [folder / f"{machine.device}.err" for machine in machines]
        self.nodes = [
            self.start(machine, errors, machines[0], programs)
            for machine, errors in zip(machines, self.errors, strict=True)
        ]

    def start(
        self, machine: Machine, errors: Path, first: Machine, programs: LoadedPrograms
    ) -> subprocess.Popen[bytes]:
        words = ["--nodes", "1:2", "--gpus-per-node", "1", "--meet", f"{first.address}:29400", "--wait", "5"]
        program = ["--program", str(programs.folder / "vlm")]
        command = [sys.executable, "-P", "-m", "vlm", "launch", self.recipes["run"], *words, *program]
        environment = {**os.environ, PACE: str(self.pace), "PYTHONPATH": str(Path.cwd())}
        with errors.open("ab") as file:
            return subprocess.Popen([str(IP), "netns", "exec", machine.space, *command], env=environment, stderr=file)

    def lines(self, node: int) -> list[str]:
        return self.errors[node].read_text().splitlines()

    def end(self) -> None:
        for node in self.nodes:
            node.kill()
            node.wait()

    def said(self, node: int, words: str) -> int:
        """How many lines of a node, its ranks' among them, have these words."""
        return sum(words in line for line in self.lines(node))

    @property
    def step(self) -> int:
        return num_lines(self.run / "metrics.jsonl")


@pytest.mark.long
def test_a_run_outlives_a_cut_a_return_and_a_pre_emption(
    tmp_path: Path, machines: tuple[Machine, Machine], programs: LoadedPrograms
) -> None:
    chain = Chain(tmp_path, machines, programs)
    try:
        cut(chain, tmp_path, machines, programs)
        live_on(chain, machines)
    finally:
        chain.end()
    assert_as_if_nothing_had_been(chain, tmp_path, STEPS)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero2", "fsdp"])
def test_under_each_engine_a_cut_is_told_in_time_and_both_ways_on_are_right(
    tmp_path: Path, machines: tuple[Machine, Machine], programs: LoadedPrograms, engine: str
) -> None:
    steps = 24
    chain = Chain(tmp_path, machines, programs, engine, steps)
    try:
        cut(chain, tmp_path, machines, programs)
        wait_until(lambda: chain.said(0, "goes on with 1 of 2 nodes, 1 rank (--nodes 1:2)") == 1)
        chain.pace.write_text("0")
        assert chain.nodes[0].wait(120) == 0
        assert not chain.said(0, "Traceback") + chain.said(1, "Traceback")
    finally:
        chain.end()
    assert_as_if_nothing_had_been(chain, tmp_path, steps)


def assert_as_if_nothing_had_been(chain: Chain, folder: Path, steps: int) -> None:
    """Compare with a run that nothing happened to: that which went on after the cut with as many ranks, and its own."""
    train_ranks(2, chain.recipes["whole"])
    assert_same_run(folder / "cut", folder / "whole")
    # With one rank for a while the sums differ in their last bits; the samples of each step do not.
    assert sets_of(chain.run) == sets_of(folder / "whole")
    assert [line["step"] for line in metrics_of(chain.run)] == list(range(1, steps + 1))
    assert losses_of(chain.run) == pytest.approx(losses_of(folder / "whole"), rel=1e-5)


def cut(chain: Chain, folder: Path, machines: tuple[Machine, Machine], programs: LoadedPrograms) -> None:
    """Cut the link in the middle; what is left of the run goes on, as a copy, with as many ranks."""
    wait_until(lambda: len(programs.running()) == 2 and chain.step >= 7)
    machines[1].link("down")
    wait_until(lambda: not programs.running(), 30)
    for node in (0, 1):  # in time, and in one line that names who was lost
        (line,) = (line for line in chain.lines(node) if line.startswith("vlm: r") and "stopped, or cut off?" in line)
        assert SILENT.match(line)
    shutil.copytree(chain.run, folder / "cut")
    train_ranks(2, chain.recipes["run"], f"run={folder / 'cut'}", resume=AUTO)


def live_on(chain: Chain, machines: tuple[Machine, Machine]) -> None:
    """Go on alone, with the other when it is back, and alone again when that is taken away."""
    chain.pace.write_text(ALONE)  # so that the run is not over before the other is back
    wait_until(lambda: chain.said(0, "goes on with 1 of 2 nodes, 1 rank (--nodes 1:2)") == 1)
    alone_from = chain.step
    wait_until(lambda: chain.step > alone_from + 1)
    machines[1].link("up")
    wait_until(lambda: chain.said(0, "goes on with 2 of 2 nodes, 2 ranks") == 1)
    chain.pace.write_text(SLOW)
    back_at = chain.step
    wait_until(lambda: chain.step >= back_at + 3)

    chain.nodes[1].send_signal(signal.SIGTERM)  # its machine is taken back
    assert chain.nodes[1].wait(60) == 143
    wait_until(lambda: chain.said(0, "goes on with 1 of 2 nodes, 1 rank (--nodes 1:2)") == 2)
    saved = [int(found[1]) for line in chain.lines(0) if (found := re.search(r"SIGTERM: step (\d+) is saved", line))]
    chain.pace.write_text("0")
    assert chain.nodes[0].wait(120) == 0
    assert saved[-1] >= back_at + 3
    assert not chain.said(0, "Traceback") + chain.said(1, "Traceback")
