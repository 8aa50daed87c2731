"""Machines by ssh: DeepSpeed's own launcher starts the nodes, here by a stand-in for pdsh on one machine.

That such a run is the same as any launcher's is in test_launchers.py.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.lives import num_lines, wait_until
from tests.launch.nodes.loaded import LAUNCHERS, PACE, loaded_programs
from tests.launch.nodes.pdsh_program import write_pdsh
from tests.launch.small import metrics_of
from tests.launch.tiny import assert_same_run, train_ranks, write_tiny, write_tiny_recipe
from tests.ranks import free_port

STEPS = 10


@pytest.mark.long
def test_a_run_by_ssh_saves_when_its_command_is_to_stop_and_goes_on(tmp_path: Path) -> None:
    with loaded_programs(tmp_path / "bin", LAUNCHERS) as programs:
        write_pdsh(programs.folder, tmp_path)
        write_tiny(tmp_path / "data")
        changes = {"duration": f"{STEPS} steps", "checkpoint_every": f"{STEPS} steps"}
        whole, recipe = (write_tiny_recipe(tmp_path / "data", tmp_path / name, **changes) for name in ("whole", "run"))
        (tmp_path / "hosts").write_text("127.0.0.1 slots=8\n# the other\n127.0.0.2\n127.0.0.3\n")
        (tmp_path / "pace").write_text("0.3")
        (tmp_path / ".deepspeed_env").write_text(f"{PACE}={tmp_path / 'pace'}\n")  # DeepSpeed takes it to the hosts
        vlm = str(programs.folder / "vlm")
        words = ["launch", recipe, "--nodes", "2", "--gpus-per-node", "1", "--on", "ssh", "--hostfile", "hosts"]
        command = [vlm, *words, "--meet", f"127.0.0.1:{free_port()}"]
        environment = {**os.environ, "PATH": programs.path, "DS_ACCELERATOR": "cpu"}
        run = tmp_path / "run"

        with (tmp_path / "said").open("wb") as said:
            life = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
        wait_until(lambda: num_lines(run / "metrics.jsonl") >= 3)
        life.send_signal(signal.SIGTERM)
        assert life.wait(60) == 143
        wait_until(lambda: not programs.running(), 60)
        lines = (tmp_path / "said").read_text().splitlines()
        (saved,) = (line for line in lines if line.startswith("vlm: stopped by SIGTERM: step"))
        assert 3 <= int(saved.split("SIGTERM: step ")[1].split()[0]) < STEPS

        (tmp_path / "pace").write_text("0")
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert [line["step"] for line in metrics_of(run)] == list(range(1, STEPS + 1))
    train_ranks(2, whole)
    assert_same_run(run, tmp_path / "whole")
