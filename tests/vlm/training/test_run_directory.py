"""The files of a run: never another run's, never half a line, cut back to the step that a run goes on from."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.vlm.checkpoint.test_format import TENSORS, groups, manifest
from vlm.batch import Batch, Skip
from vlm.checkpoint.folder import complete_checkpoints
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.writer import write_checkpoint
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.training.run_directory import RunDirectory


def batch(keys: tuple[str, ...]) -> Batch:
    return Batch(step=0, sample_ids=torch.arange(len(keys)), keys=keys, parts={})


def test_files_are_cut_back_to_a_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", World())
    run.start({"seed": 1}, {})
    for step in (1, 2, 3):
        run.log_metrics({"step": step, "loss": 1 / step})
        run.record_samples(step, batch((f"a{step}", "b")))
        run.log_skips([(step, Skip("s", "x.tar", f"k{step}", "broken", "other"))])
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # torn by a crash
    assert run.truncate_after(2) == [f"{run.path}/metrics.jsonl: the last line was torn, and is left out"]
    for name in ("metrics.jsonl", "ledger.jsonl", "samples/rank-0.jsonl"):
        lines = (run.path / name).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert json.loads((run.path / "samples/rank-0.jsonl").read_text().splitlines()[1])["keys"] == ["a2", "b"]


def begun(path: Path) -> RunDirectory:
    """A run that has come to its first step, and whose process has ended."""
    run = RunDirectory(path, World())
    run.claim(resuming=False)
    run.start({}, {})
    run.log_metrics({"step": 1})
    run.release()
    return run


def test_evaluations_to_be_run_again_leave_nothing_of_their_step(tmp_path: Path) -> None:
    """A stop left two evaluations to a next life, which was killed after the first of them: both are run once more."""
    run = RunDirectory(tmp_path / "run", World())
    run.start({}, {})
    bad = {name: Skip(name, "x.tar", "k", "broken", "") for name in ("pairs", "evaluate:a", "evaluate:b", "evaluate:z")}
    run.log_metrics({"step": 3, "eval/a/R@1": 0.1})
    run.log_skips([(3, bad["evaluate:a"])])
    run.log_metrics({"step": 6, "loss": 1.0})
    run.log_metrics({"step": 6, "eval/z/R@1": 0.2})
    run.log_skips([(6, bad["pairs"]), (6, bad["evaluate:z"])])
    before = [(run.path / name).read_text() for name in ("metrics.jsonl", "ledger.jsonl")]
    run.log_metrics({"step": 6, "eval/a/R@1": 0.3})
    run.log_skips([(6, bad["evaluate:a"])])
    run.drop_evaluations(6, ["a", "b"])
    assert [(run.path / name).read_text() for name in ("metrics.jsonl", "ledger.jsonl")] == before


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(UserError, match=r"already holds a run; .*--resume auto"):
        RunDirectory(tmp_path / "run", World()).claim(resuming=False)
    RunDirectory(tmp_path / "run", World()).claim(resuming=True)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty and holds no run \(found thesis.tex\)"):
        RunDirectory(tmp_path, World()).claim(resuming=False)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(tmp_path / "run", World()).claim(resuming=False)


@pytest.mark.parametrize("resuming", [False, True])
@pytest.mark.parametrize(
    "left", [(), ("owner.json",), ("checkpoints/", ".run.json.x1.partial"), ("run.json", "recipe.yaml", "ledger.jsonl")]
)
def test_what_a_killed_start_left_is_begun_in_again(tmp_path: Path, left: tuple[str, ...], resuming: bool) -> None:
    for name in left:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("")
    run = RunDirectory(tmp_path, World())
    run.claim(resuming=resuming)
    assert not run.is_started
    run.start({"seed": 1}, {})
    assert run.recipe() == {"seed": 1}
    assert not list(tmp_path.glob(".*"))


def test_a_line_of_the_history_that_a_kill_tore_spoils_no_other(tmp_path: Path) -> None:
    run = begun(tmp_path)
    with run.history.path.open("a") as file:
        file.write('{"event": "sav')
    run.claim(resuming=True)
    run.start({}, {}, 3)
    run.history.add("saved", 6)
    events = [json.loads(line) for line in run.history.path.read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("began", 0), ("resumed", 3), ("saved", 6)]
    assert run.last_saved() == 6


def test_a_torn_line_of_the_history_is_mended_before_a_run_goes_back(tmp_path: Path) -> None:
    run = begun(tmp_path)
    paths = [write_checkpoint(run.checkpoints, manifest(step), groups(TENSORS), World()) for step in (3, 6)]
    with run.history.path.open("a") as file:
        file.write('{"event": "sav')
    run.claim(resuming=True)
    run.start({}, {}, 3, paths[0])
    run.require_undamaged()
    events = [json.loads(line) for line in run.history.path.read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("began", 0), ("set_aside", 3), ("resumed", 3)]


def test_a_checkpoint_of_links_beside_other_things_becomes_the_runs_own(tmp_path: Path) -> None:
    """As a hub's cache has it: names that are relative links to files that lie elsewhere."""
    written = write_checkpoint(tmp_path / "blobs", manifest(3), groups(TENSORS), World())
    linked = tmp_path / "snapshot" / written.name
    (linked / "notes").mkdir(parents=True)
    for file in written.iterdir():
        (linked / file.name).symlink_to(Path("../../blobs") / written.name / file.name)
    run = RunDirectory(tmp_path / "run", World())
    run.claim(resuming=True)
    run.start({}, {}, 3, linked)
    (own,) = run.complete_checkpoints()
    Checkpoint(own).verify(World())
    assert sorted(os.listdir(own)) == sorted(os.listdir(written))


def test_a_recipe_that_no_run_wrote_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# my own\nseed: 1\n")
    with pytest.raises(UserError, match="already holds a run"):
        RunDirectory(tmp_path, World()).claim(resuming=False)


def test_a_run_without_its_recipe_is_no_place_to_begin(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"holds the work of a run but no recipe\.yaml; put that back"):
        RunDirectory(tmp_path, World()).claim(resuming=True)


def test_two_that_begin_at_once_are_told_apart(tmp_path: Path) -> None:
    first, second = (RunDirectory(tmp_path / "run", World()) for _ in range(2))
    for run in (first, second):
        run.claim(resuming=False)  # nothing is there yet
    first.start({}, {})
    with pytest.raises(UserError, match=rf"run is being written by process {os.getpid()} on "):
        second.start({}, {})
    first.log_metrics({"step": 1})
    first.release()
    with pytest.raises(UserError, match="another process has begun a run there meanwhile"):
        second.start({}, {})


def test_going_back_sets_aside_what_was_saved_and_logged_later(tmp_path: Path) -> None:
    run = begun(tmp_path)
    steps = (10, 25, 30)
    paths = {step: write_checkpoint(run.checkpoints, manifest(step), groups(TENSORS), World()) for step in steps}
    for step in range(2, 31):
        run.log_metrics({"step": step})
    run.claim(resuming=True)
    (said,) = run.start({}, {}, 10, paths[10])
    assert said.startswith("going on from step 10: the checkpoints of steps 25, 30 and the log until then lie in ")
    assert said.endswith(f"{tmp_path}/set-aside/1 now")
    assert run.truncate_after(10) == []
    assert run.checkpoint_steps() == [10]
    assert list(complete_checkpoints(tmp_path / "set-aside/1")) == [25, 30]
    assert [line["step"] for line in run.metrics()] == list(range(1, 11))
    assert (tmp_path / "set-aside/1/metrics.jsonl").read_text().count("\n") == 30
    # And forth again, to a checkpoint that lies elsewhere: it becomes the run's own.
    run.start({}, {}, 25, tmp_path / "set-aside/1/step-00000025")
    assert run.checkpoint_steps() == [10, 25]
    assert Checkpoint(paths[25]).tensors("weights").keys() == TENSORS.keys()
    # Another checkpoint of the same step takes the place of the run's own.
    other = write_checkpoint(tmp_path / "other", manifest(25), groups({"other": torch.ones(1)}), World())
    assert "the checkpoints of steps 25 and the log" in run.start({}, {}, 25, other)[0]
    assert list(Checkpoint(paths[25]).tensors("weights")) == ["other"]
    assert list(complete_checkpoints(tmp_path / "set-aside/2")) == [25]


def start(run: RunDirectory) -> None:
    run.claim(resuming=False)
    run.start({}, {})


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/sys").is_dir(), reason="root may write anywhere here")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    # Root ignores permission bits; a virtual file system refuses even root.
    place = Path("/proc/sys") if os.access(place, os.W_OK) else place
    with pytest.raises(UserError, match="cannot be written"):
        start(RunDirectory(place / "run", World()))
