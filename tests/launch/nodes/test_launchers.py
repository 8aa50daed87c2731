"""Whichever launcher starts the ranks, the run is the same; what contradicts the recipe is overruled aloud."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.launch.nodes.loaded import LAUNCHERS, LoadedPrograms, loaded_programs
from tests.launch.nodes.pdsh_program import write_pdsh
from tests.launch.nodes.slurm import StandIn
from tests.launch.tiny import assert_same_run, train_ranks, write_tiny, write_tiny_recipe
from tests.ranks import free_port

MPIRUN = Path(sys.executable).parent / "mpirun"
# Where there is no Open MPI: what it says to each of its processes.
MPIRUN_STAND_IN = """#!/bin/sh
while [ "$1" != -n ]; do shift; done
size=$2; shift 2
export OMPI_COMM_WORLD_SIZE=$size OMPI_COMM_WORLD_LOCAL_SIZE=$size PMIX_NAMESPACE=mpirun-$$@1
OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_LOCAL_RANK=1 "$@" &
OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_LOCAL_RANK=0 "$@" && wait $!
"""


class Here:
    """Data, the programs on the PATH, and the run that the others are to be like."""

    def __init__(self, folder: Path, programs: LoadedPrograms) -> None:
        self.folder = folder
        self.programs = programs
        self.slurm = StandIn(folder / "slurm")
        if not MPIRUN.exists():
            (folder / "slurm" / "mpirun").write_text(MPIRUN_STAND_IN)
            (folder / "slurm" / "mpirun").chmod(0o755)
        write_tiny(folder / "data")
        train_ranks(2, self.recipe("whole"))

    def recipe(self, name: str) -> str:
        return write_tiny_recipe(self.folder / "data", self.folder / name, duration="2 steps")

    def launched(self, name: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A launcher's command to its end, `vlm train` behind it."""
        return self.run(*command, "vlm", "train", self.recipe(name), **environment)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, "PATH": f"{self.slurm.folder}:{self.programs.path}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=240,
        )

    def assert_the_same(self, name: str, done: subprocess.CompletedProcess[str]) -> None:
        assert done.returncode == 0, done.stdout
        assert ": 2 ranks on 1 machine" in done.stdout
        assert_same_run(self.folder / name, self.folder / "whole")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("launchers")
    with loaded_programs(folder / "bin", LAUNCHERS) as programs:
        yield Here(folder, programs)


COMMANDS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"],
    # It puts --local_rank=N before the arguments.
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--no_python"],
    "srun": ["srun", "--nodes=2", "--ntasks=2"],
    "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"],
}


@pytest.mark.parametrize("launcher", COMMANDS)
def test_each_launcher_starts_the_same_run(here: Here, launcher: str) -> None:
    done = here.launched(launcher, *COMMANDS[launcher], DS_ACCELERATOR="cpu")
    here.assert_the_same(launcher, done)


@pytest.mark.long
def test_so_do_nodes_by_ssh(here: Here) -> None:
    """DeepSpeed's launcher, by a stand-in for pdsh, starts an agent a host; here all hosts are this one."""
    write_pdsh(here.slurm.folder, here.folder)
    (here.folder / "hosts").write_text("127.0.0.1 slots=8\n# the other\n127.0.0.2\n127.0.0.3\n")
    words = ["--nodes=2", "--gpus-per-node=1", "--on=ssh", f"--meet=127.0.0.1:{free_port()}", "--hostfile=hosts"]
    done = here.run("vlm", "launch", here.recipe("ssh"), *words, DS_ACCELERATOR="cpu")
    here.assert_the_same("ssh", done)


ACCELERATE: dict[str, tuple[dict[str, object], list[str]]] = {
    "multi_gpu": ({"distributed_type": "MULTI_GPU"}, ["mixed_precision 'bf16'"]),
    "deepspeed": (
        {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"zero_stage": 3, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5},
        },
        ["gradient_accumulation_steps '4'", "gradient_clipping '0.5'", "use_deepspeed 'true'"],
    ),
}


def accelerate(here: Here, name: str, config: dict[str, object], *words: str) -> subprocess.CompletedProcess[str]:
    """What `accelerate launch` does by a configuration file like the one of a user that it reads unasked."""
    place = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "main_process_port": 0, "use_cpu": False}
    file = here.folder / f"{name}-config.yaml"
    file.write_text(yaml.safe_dump({**place, **config}))
    return here.launched(name, "accelerate", "launch", "--config_file", str(file), "--no_python", *words)


@pytest.mark.parametrize("kind", ACCELERATE)
def test_accelerates_configuration_is_overruled_aloud(here: Here, kind: str) -> None:
    config, words = ACCELERATE[kind]
    name = f"accelerate-{kind}"
    done = accelerate(here, name, {"num_processes": 2, "mixed_precision": "bf16", **config})
    (line,) = (line for line in done.stdout.splitlines() if "the recipe decides" in line)
    assert all(word in line for word in words)
    assert "engine ddp, precision fp32" in line
    here.assert_the_same(name, done)


@pytest.mark.parametrize(
    "words",
    [
        ["--cpu", "--num_processes=2"],
        ["--num_processes=1", "--num_machines=2", "--machine_rank=0", "--main_process_ip=localhost"],
    ],
)
def test_one_process_where_accelerate_was_to_start_several_is_one_line(here: Here, words: list[str]) -> None:
    done = accelerate(here, "lonely", {"distributed_type": "NO", "main_process_port": 29_500}, *words)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("vlm: "))
    assert line.startswith("vlm: accelerate was asked for several processes and started one")
    assert done.returncode
    assert not (here.folder / "lonely").exists()
