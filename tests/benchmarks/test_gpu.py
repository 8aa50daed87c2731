"""What is to be tried on a GPU, tried on a CPU: the checks pass, see what is wrong, and none stops another."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import losses, pairs, towers, transfers
from benchmarks.gpu.checks import CHECKS, run_check
from benchmarks.gpu.everything import CHECK_NAMES
from benchmarks.gpu.imported import closure, requirements_of
from benchmarks.gpu.losses import NAMES
from benchmarks.gpu.machine import _published
from benchmarks.gpu.report import check_lines, loss_table, step_table
from benchmarks.gpu.setting import Line, Setting
from benchmarks.gpu.steps import measure_steps
from benchmarks.gpu.worker import Worker
from benchmarks.loss.ways import Leaves, Way, term
from vlm.distributed.world import World

ROOT = Path(__file__).parents[2]
PARTS = "tests.benchmarks.parts_that_fail"
TERA = 1e12


def test_a_part_that_fails_hangs_or_ends_its_process_stops_no_other() -> None:
    with Worker({}) as worker:
        assert worker.ask(f"{PARTS}:answer", {"number": 1}, 60).value == 1
        assert worker.ask(f"{PARTS}:fail", {}, 60).problem == "ValueError: an illegal memory access"
        assert worker.ask(f"{PARTS}:hang", {}, 0.1).problem == "not done in 0 s"
        assert worker.ask(f"{PARTS}:end", {}, 60).problem == "its process ended (out of luck)"
        assert worker.ask(f"{PARTS}:answer", {"number": 2}, 60).value == 2
    with Worker({}, ("benchmarks.no_such_module",)) as worker:
        problem = worker.ask(f"{PARTS}:answer", {"number": 1}, 60).problem
        assert problem is not None
        assert "No module named 'benchmarks.no_such_module'" in problem


def test_the_names_are_those_of_the_checks() -> None:
    assert tuple(CHECKS) == CHECK_NAMES


@pytest.mark.parametrize("name", ["towers", "tiles", "bf16", "group", "copies"])
def test_a_check_passes(name: str) -> None:
    found = run_check("cpu", True, name)
    assert [line for line in found["lines"] if not line["passed"]] == []
    assert found["lines"]
    assert found["notes"] == []


def test_what_is_wrong_by_a_thousandth_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_term(objective: dict[str, Any], product: str = "fp32") -> Way:
        right = term(objective, product)

        def loss(rows: Leaves, world: World) -> torch.Tensor:
            return 1.001 * right(rows, world)

        return loss

    monkeypatch.setattr(pairs, "term", wrong_term)
    in_fp32 = [line for line in run_check("cpu", True, "tiles")["lines"] if "fp32" in line["what"]]
    assert [line["passed"] for line in in_fp32] == [False] * len(in_fp32)
    right_loss = towers._loss
    # `1.01 *` of one side's loss alone: the other model's gradients are not those any more.
    monkeypatch.setattr(
        towers, "_loss", lambda image, text: right_loss(image, text) * (1.01 if image.dtype == torch.float32 else 1)
    )
    verdicts = {line["what"]: line["passed"] for line in run_check("cpu", True, "towers")["lines"]}
    assert verdicts == {"image embeddings": True, "text embeddings": True, "gradients of all weights": False}
    monkeypatch.setitem(transfers._COLLECTIVES, "sum", lambda own, out: out.copy_(2 * own))
    assert not run_check("cpu", True, "group")["lines"][0]["passed"]
    assert not Line("no number", float("nan"), 1.0).passed


@pytest.mark.slow
def test_the_command_compares_the_kernels_and_writes_what_it_found(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "-P", "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    asked = ["--seconds", "900", "--only", "kernels"]
    ended = subprocess.run([*command, *asked], capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "| kernels: bf16, gradients | passed |" in ended.stdout
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "checks"}
    assert [line["passed"] for line in found["checks"]["kernels"]["value"]["lines"]] == [True] * 4


@pytest.mark.long
def test_a_run_resumed_ends_with_the_same_bits() -> None:
    assert [line["error"] for line in run_check("cpu", True, "resume")["lines"]] == [0.0] * 3


def test_steps_and_losses_become_tables() -> None:
    value = measure_steps("cpu", True, "tiny", [4], ["vlm", "open_clip"], 0.0)
    assert value["pairs"] == 4
    assert all(figures["flops"] > 1e6 for figures in value["ways"].values())
    answer = {"value": value, "problem": None, "seconds": 1.0}
    table = step_table("a tiny model", answer, 1e15).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["vlm", "open_clip"]
    assert step_table("it", {"value": None, "problem": "no memory"}, None) == "it: **FAILED**: no memory"
    answers = {size: {"value": losses.measure_losses("cpu", True, size, 60.0), "problem": None} for size in (16, 32)}
    rows = loss_table(answers).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == list(NAMES)
    assert "no time left" in loss_table({16: {"value": losses.measure_losses("cpu", True, 16, -1.0), "problem": None}})
    failed = check_lines("towers", {"value": None, "problem": "not done in 60 s", "seconds": 60.0})
    assert failed == "| towers | **FAILED** | not done in 60 s | | 60.0 |"


def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    from benchmarks.gpu.machine import describe

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="sees no GPU"):
        describe("cuda", False)
    assert Setting("cpu", True).choose(5, 3) == 3


@pytest.mark.parametrize(
    ("name", "gigabytes", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 85, 989),
        ("NVIDIA A100-SXM4-40GB", 42, 312),
        ("NVIDIA GeForce RTX 4090", 25, 165),
        ("NVIDIA L4", 24, 121),
        ("NVIDIA L40S", 48, 362),
        ("Tesla V100-SXM2-32GB", 34, 15.7),
        ("NVIDIA GeForce RTX 3060", 12, None),
    ],
)
def test_the_published_peak_is_that_of_the_device(name: str, gigabytes: float, tflops: float | None) -> None:
    assert _published(name, int(gigabytes * 1e9)) == (None if tflops is None else tflops * TERA)


def test_what_is_needed_beside_torch_is_all_that_is_asked_for() -> None:
    asked = {"a": ["b"], "b": ["c", "a"], "c": [], "d": []}
    assert closure(["a"], asked.__getitem__) == {"a", "b", "c"}
    assert "sympy" in closure(["torch"], requirements_of)
    assert {"timm", "ftfy", "huggingface-hub", "tqdm"} <= closure(["open-clip-torch"], requirements_of)
    assert version("tqdm")
