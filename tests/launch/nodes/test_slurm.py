"""A job on Slurm from `vlm launch` to its end: the script that is generated runs, by stand-ins for Slurm's programs."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.lives import num_lines, wait_until
from tests.launch.nodes.loaded import PACE, LoadedPrograms, loaded_programs
from tests.launch.nodes.slurm import StandIn
from tests.launch.small import metrics_of
from tests.launch.tiny import assert_same_run, train_ranks, write_tiny, write_tiny_recipe

STEPS = 10


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[StandIn]:
    slurm = StandIn(tmp_path / "slurm")
    try:
        yield slurm
    finally:
        slurm.end()


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[LoadedPrograms]:
    with loaded_programs(tmp_path / "bin") as programs:
        yield programs


def submit(recipe: str, path: str, *words: str, **environment: str) -> None:
    """`vlm launch --on slurm`, as a user types it."""
    command = [sys.executable, "-P", "-m", "vlm", "launch", recipe, "--nodes", "2", "--gpus-per-node", "1"]
    done = subprocess.run(
        [*command, "--on", "slurm", "--grace", "20", *words],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(Path.cwd()), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"written: .*/run\.sbatch\nSubmitted batch job \d+\n", done.stdout)


def test_a_job_saves_before_its_time_is_over_and_goes_on_to_the_same_end(
    tmp_path: Path, slurm: StandIn, programs: LoadedPrograms
) -> None:
    write_tiny(tmp_path / "data")
    changes = {"duration": f"{STEPS} steps", "checkpoint_every": f"{STEPS} steps"}
    whole, recipe = (write_tiny_recipe(tmp_path / "data", tmp_path / name, **changes) for name in ("whole", "run"))
    pace = tmp_path / "pace"
    pace.write_text("0.3")
    submit(recipe, f"{slurm.folder}:{programs.path}", f"--program={programs.folder}/vlm", **{PACE: str(pace)})
    run = tmp_path / "run"
    wait_until(lambda: num_lines(run / "metrics.jsonl") >= 3)
    slurm.warn()
    wait_until(lambda: len(slurm.job()["lives"]) == 1)
    pace.write_text("0")
    job = slurm.ended()
    assert job["lives"] == [143, 0]
    assert job["options"].items() >= {"nodes": "2", "signal": "B:USR1@60", "requeue": ""}.items()

    agents = [environment for arguments, environment in programs.commands if arguments[0] == "launch"]
    assert sorted(one["SLURM_NODEID"] for one in agents) == ["0", "0", "1", "1"]
    assert {one.get("SLURM_RESTART_COUNT") for one in agents} == {None, "1"}
    lines = Path(f"{run}-slurm-{slurm.number}.out").read_text().splitlines()
    (saved,) = (line for line in lines if line.startswith("vlm: stopped by SIGUSR1: step"))
    queued = f"vlm launch: the time is nearly over; job {slurm.number} is queued again and goes on from what is saved"
    assert queued in lines
    assert not [line for line in lines if "Traceback" in line]
    first = int(saved.split("SIGUSR1: step ")[1].split()[0])
    assert 3 <= first < STEPS
    assert [line["step"] for line in metrics_of(run)] == list(range(1, STEPS + 1))
    train_ranks(2, whole)
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.long
def test_a_job_that_is_pre_empted_is_queued_again_by_slurm_and_ends_alike(tmp_path: Path, slurm: StandIn) -> None:
    """By the `vlm` of this environment: Slurm's signals reach each process of a step, and come again by the agents."""
    write_tiny(tmp_path / "data")
    changes = {"duration": "150 steps", "checkpoint_every": "150 steps", "data": {"max_bad_share": 1}}
    whole, recipe = (write_tiny_recipe(tmp_path / "data", tmp_path / name, **changes) for name in ("whole", "run"))
    path = f"{slurm.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    submit(recipe, path, "--time", "30", "--sbatch=qos=a")
    run = tmp_path / "run"
    wait_until(lambda: num_lines(run / "metrics.jsonl") >= 3)
    slurm.pre_empt()
    job = slurm.ended()
    assert job["lives"] == [143, 0]
    lines = Path(f"{run}-slurm-{slurm.number}.out").read_text().splitlines()
    (saved,) = (line for line in lines if line.startswith("vlm: stopped by SIGTERM: step"))
    assert 3 <= int(saved.split("SIGTERM: step ")[1].split()[0]) < 150
    assert not [line for line in lines if "Traceback" in line or line.startswith("vlm launch: ")]
    train_ranks(2, whole)
    assert_same_run(run, tmp_path / "whole")
