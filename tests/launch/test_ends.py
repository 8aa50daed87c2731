"""Any end of a rank is one line on each rank's standard error and in the run's record, within seconds."""

import json
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.data.small_shards import sample, write_shard
from tests.launch.lives import Life, end_all, num_lines, start_command, start_ranks, wait_until
from tests.launch.tiny import assert_same_run, train_here, train_ranks, write_tiny, write_tiny_recipe
from vlm.ends.end import StoppedError
from vlm.ends.stops import Stops
from vlm.model.dual_encoder import DualEncoder

LONG: dict[str, Any] = {"duration": "100000 steps", "checkpoint_every": "100000 steps", "keep_checkpoints": 1}
PATIENCE = 2.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiny(folder)
    return folder


@pytest.fixture
def lives() -> Iterator[list[Life]]:
    begun: list[Life] = []
    yield begun
    end_all(begun)


def failures_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "failures.jsonl").read_text().splitlines()]


def only_line(life: Life) -> str:
    (line,) = life.said
    return line


def two_ranks(data: Path, run: Path, lives: list[Life], **changes: Any) -> None:
    """Two ranks in the midst of a run."""
    recipe = write_tiny_recipe(
        data, run, **LONG, **changes, data={"workers": 1, "patience": PATIENCE, "max_bad_share": 1}
    )
    lives += start_ranks(2, ["train", recipe], run.with_suffix(".err"))
    wait_until(lambda: num_lines(run / "metrics.jsonl") > 3)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_rank_names_one_that_was_killed(data: Path, tmp_path: Path, lives: list[Life], victim: int) -> None:
    two_ranks(data, tmp_path / "run", lives)
    lives[victim].signal(signal.SIGKILL)
    assert lives[1 - victim].ended(60) == 1
    line = only_line(lives[1 - victim])
    assert line.startswith("vlm: rank 1: rank 0 on " if victim == 0 else "vlm: rank 1 on ")
    assert "is gone without a word" in line
    (record,) = failures_of(tmp_path / "run")
    assert (record["rank"], record["kind"]) == (1 - victim, "lost")


def test_a_stopped_rank_is_named_when_patience_is_over(data: Path, tmp_path: Path, lives: list[Life]) -> None:
    two_ranks(data, tmp_path / "run", lives)
    lives[1].signal(signal.SIGSTOP)
    began = time.monotonic()
    assert lives[0].ended(60) == 1
    assert time.monotonic() - began >= PATIENCE - 1
    assert re.fullmatch(r"vlm: rank 1 on .* has been silent for \d s \(data\.patience\).*", only_line(lives[0]))
    lives[1].signal(signal.SIGCONT)  # it finds that the others went on without it
    assert lives[1].ended(60) == 1
    assert "rank 0" in only_line(lives[1])


def test_what_ends_one_rank_is_told_by_all(data: Path, tmp_path: Path, lives: list[Life]) -> None:
    two_ranks(data, tmp_path / "run", lives)
    (worker,) = psutil.Process(lives[1].pid).children()
    worker.kill()
    assert [life.ended(60) for life in lives] == [2, 2]
    own = only_line(lives[1]).removeprefix("vlm: rank 1: ")
    assert own.startswith("loading worker 0 died (killed? out of memory?) at step ")
    assert only_line(lives[0]) == f"vlm: rank 1 ended: {own}"
    assert {(one["rank"], one["kind"]) for one in failures_of(tmp_path / "run")} == {(0, "lost"), (1, "user")}


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_they_go_on_exactly(
    data: Path, tmp_path: Path, lives: list[Life]
) -> None:
    changes: dict[str, Any] = {"duration": "24 steps", "checkpoint_every": "100 steps", "log_every": "3 steps"}
    loading = {"workers": 1, "max_bad_share": 1}
    recipes = [write_tiny_recipe(data, tmp_path / name, **changes, data=loading) for name in ("whole", "stopped")]
    lives += start_ranks(2, ["train", recipes[1]], tmp_path / "err")
    run = tmp_path / "stopped"
    wait_until(lambda: num_lines(run / "metrics.jsonl") > 2)
    lives[1].signal(signal.SIGTERM)
    assert [life.ended(60) for life in lives] == [143, 143]
    (checkpoint,) = (run / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    told = f"stopped by SIGTERM: step {step} is saved; go on by: vlm train {recipes[1]} --resume auto"
    assert [only_line(life) for life in lives] == [f"vlm: {told}", f"vlm: rank 1: {told}"]
    assert 6 < step < 24
    train_ranks(2, recipes[1], resume="auto")
    train_ranks(2, recipes[0])
    assert_same_run(run, tmp_path / "whole")


def _with_little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))


def test_a_rank_out_of_memory_is_told_by_all_after_a_step_without_a_number_and_a_spike_of_its_own(
    data: Path, tmp_path: Path, lives: list[Life]
) -> None:
    """All three are planted on rank 1 alone; the first two change nothing, and the run goes on."""
    poison = "tests.vlm.training.poison:"
    planted: dict[str, Any] = {
        f"{poison}Poison": {"weight": 1.0, "rank": 1, "steps": [3]},
        f"{poison}Spike": {"weight": 1.0, "rank": 1, "steps": [6], "loss": 200.0},
        f"{poison}Hungry": {"weight": 1.0, "rank": 1, "steps": [8]},
    }
    guard = {"figures": ["loss"], "z": 30, "window": 3}
    run = tmp_path / "run"
    recipe = write_tiny_recipe(
        data, run, objective={"clip": 1.0, **planted}, guard=guard, data={"max_bad_share": 1, "patience": 60}
    )
    lives += start_ranks(2, ["train", recipe, "--trust"], tmp_path / "err", _with_little_memory)
    assert [life.ended(60) for life in lives] == [1, 1]
    line = "out of memory (tried to allocate 1,024.00 GiB); a smaller micro_batch needs less"
    assert only_line(lives[1]) == f"vlm: rank 1: {line}; the traceback is in {run}/traceback-rank-1.txt"
    assert only_line(lives[0]) == f"vlm: rank 1 ended: {line}"
    told = [(one["kind"], one["rank"]) for one in failures_of(run)]
    assert sorted(told[:2]) == [("step-left-out", 0), ("step-left-out", 1)]
    assert sorted(told[2:4]) == [("spike", 0), ("spike", 1)]
    assert sorted(told[4:]) == [("failure", 1), ("lost", 0)]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["steps_left_out"] for step in steps] == [0, 0, 0, 1, 1, 1, 2, 2]


def evaluated(folder: Path, run: Path) -> str:
    """A recipe with two evaluations of three forwards of images and as many of texts, every five steps."""
    one = {"kind": "retrieval", "shards": str(folder / "held-out.tar"), "every": "5 steps", "batch_size": 4}
    changes: dict[str, Any] = {"evaluate": {"one": one, "two": one}, "log_every": "4 steps", "duration": "10 steps"}
    return write_tiny_recipe(folder, run, **changes, data={"max_bad_share": 1})


@pytest.fixture(scope="module")
def left_alone(data: Path) -> Path:
    write_shard(data / "held-out.tar", [sample(number) for number in range(12)])
    train_here(evaluated(data, data / "left-alone"))
    return data / "left-alone"


@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_a_stop_in_the_midst_of_a_run_changes_nothing(
    data: Path, left_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Stopped after a step that is neither logged nor saved by itself, or between two forwards of its evaluation."""
    recipe = evaluated(data, tmp_path / "run")
    ask, check = Stops.ask, Stops.check

    def asked_after_step_seven(self: Stops, step: int, last: int) -> None:
        if step == 7 and moment == "step":
            signal.raise_signal(signal.SIGINT)
        ask(self, step, last)

    def asked_in_the_second_evaluation(self: Stops) -> None:
        if self._calls == 8 and moment == "evaluation":
            signal.raise_signal(signal.SIGINT)
        check(self)

    monkeypatch.setattr(Stops, "ask", asked_after_step_seven)
    monkeypatch.setattr(Stops, "check", asked_in_the_second_evaluation)
    with pytest.raises(StoppedError, match="step 7 is saved" if moment == "step" else "step 5 is saved"):
        train_here(recipe)
    monkeypatch.undo()
    train_here(recipe, resume="auto")
    assert_same_run(tmp_path / "run", left_alone)


def _signal_rank_1_in_its_third_forward(number: int) -> None:
    """Patch the evaluation of this process so that rank 1 sends itself this signal."""
    forwards, encode = count(1), DualEncoder.encode_image

    def encode_until_the_third(self: DualEncoder, *arguments: Any, **options: Any) -> Any:
        if next(forwards) == 3 and os.environ["RANK"] == "1":
            signal.raise_signal(number)
        return encode(self, *arguments, **options)

    DualEncoder.encode_image = encode_until_the_third  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGKILL, "is gone without a word"), (signal.SIGSTOP, r"has been silent for \d s \(--patience\)")],
)
def test_a_rank_lost_in_an_evaluation_is_named(
    data: Path, left_alone: Path, tmp_path: Path, lives: list[Life], number: int, how: str
) -> None:
    shards, figures = str(data / "held-out.tar"), tmp_path / "figures.json"
    arguments = ["eval", "retrieval", str(left_alone), "--data", shards, "--batch-size", "1", "--json", str(figures)]
    lose = partial(_signal_rank_1_in_its_third_forward, number)
    lives += start_ranks(2, [*arguments, "--patience", "2"], tmp_path / "err", lose)
    assert lives[0].ended(60) == 1
    assert re.match(rf"vlm: rank 1 on .* {how}", only_line(lives[0]))
    assert not figures.exists()


def test_a_port_in_use_is_one_line(data: Path, tmp_path: Path, lives: list[Life]) -> None:
    with socket.create_server(("", 0)) as taken:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]), "WORLD_SIZE": "2", "RANK": "0"}
        recipe = write_tiny_recipe(data, tmp_path / "run")
        lives.append(start_command(["train", recipe], tmp_path / "err", {**place, "LOCAL_RANK": "0"}))
        assert lives[0].ended(60) == 2
    line = only_line(lives[0])
    assert line.startswith("vlm: the ranks cannot meet at 127.0.0.1:")
    assert line.endswith("the port is in use; choose another")
