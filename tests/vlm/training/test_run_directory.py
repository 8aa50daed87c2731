"""The files of a run: never another run's, never half a line, cut back to the step that a run goes on from."""

import json
import os
from pathlib import Path

import pytest
import torch

from vlm.batch import Batch, Skip
from vlm.errors import UserError
from vlm.training.run_directory import RunDirectory
from vlm.world import World


def batch(keys: tuple[str, ...]) -> Batch:
    n = len(keys)
    return Batch(
        step=0,
        images=torch.zeros(n, 3, 2, 2, dtype=torch.uint8),
        tokens=torch.zeros(n, 4, dtype=torch.int64),
        lengths=torch.full((n,), 4),
        sample_ids=torch.arange(n),
        keys=keys,
    )


def test_files_are_cut_back_to_a_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", World())
    run.start({"seed": 1}, {})
    for step in (1, 2, 3):
        run.log_metrics({"step": step, "loss": 1 / step})
        run.record_samples(step, batch((f"a{step}", "b")))
        run.log_skips(step, [Skip("s", "x.tar", f"k{step}", "broken", "other")])
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # torn by a crash
    run.cut_back(2)
    for name in ("metrics.jsonl", "ledger.jsonl", "samples/rank-0.jsonl"):
        lines = (run.path / name).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert json.loads((run.path / "samples/rank-0.jsonl").read_text().splitlines()[1])["keys"] == ["a2", "b"]


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", World())
    run.require_usable(resuming=False)
    run.start({}, {})
    with pytest.raises(UserError, match=r"already holds a run; .*--resume auto"):
        run.require_usable(resuming=False)
    run.require_usable(resuming=True)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty and holds no run \(found thesis.tex\)"):
        RunDirectory(tmp_path, World()).require_usable(resuming=False)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(tmp_path / "run", World()).require_usable(resuming=False)


def start(run: RunDirectory) -> None:
    run.require_usable(resuming=False)
    run.start({}, {})


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/sys").is_dir(), reason="root may write anywhere here")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    # Root ignores permission bits; a virtual file system refuses even root.
    place = Path("/proc/sys") if os.access(place, os.W_OK) else place
    with pytest.raises(UserError, match="cannot be written"):
        start(RunDirectory(place / "run", World()))
