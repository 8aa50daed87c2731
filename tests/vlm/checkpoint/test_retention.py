"""Which checkpoints are kept, by their steps and figures alone; one that is read is never deleted."""

import math
import os
from pathlib import Path

import torch

from tests.vlm.checkpoint.test_format import groups, manifest
from vlm.checkpoint.deletion import Deletion
from vlm.checkpoint.folder import checkpoint_at, clear_unfinished, complete_checkpoints, delete, put_away
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.retention import Best, Retention
from vlm.checkpoint.writer import write_checkpoint
from vlm.distributed.world import World

SAVED = [3, 6, 9, 10, 12, 15, 18]  # every 3 steps, and a stop at 10


def test_the_newest_and_the_first_after_each_multiple_are_kept() -> None:
    assert Retention(2, 3).kept(SAVED, {}) == {15, 18}
    assert Retention(1, 3, every_steps=6).kept(SAVED, {}) == {6, 12, 18}
    # Multiples of 7: 7, 14; the regular checkpoints at or after them are 9 and 15.
    assert Retention(1, 3, every_steps=7).kept(SAVED, {}) == {9, 15, 18}
    assert Retention(1, 3, every_steps=2).kept(SAVED, {}) == set(SAVED) - {10}


def test_the_best_are_kept_by_the_direction_of_their_metric() -> None:
    figures = {"recall": {3: 0.5, 6: 0.9, 9: 0.7, 12: 0.9, 15: math.nan, 18: 0.1, 21: 1.0}}
    for count, best in ((1, {12}), (2, {6, 12}), (3, {6, 9, 12}), (9, {3, 6, 9, 12})):  # 21 has no checkpoint
        assert Retention(1, 3, None, (Best("recall", count, higher=True),)).kept(SAVED, figures) == best | {18}
    assert Retention(1, 3, None, (Best("recall", 2, higher=False),)).kept(SAVED, figures) == {3, 18}
    assert Retention(1, 3, None, (Best("other", 2, higher=False),)).kept(SAVED, figures) == {18}


def test_a_checkpoint_that_is_read_is_pruned_the_next_time(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path, manifest(step), groups({"a": torch.ones(3)}), World()) for step in (1, 2, 3)]
    reader, released = Checkpoint(paths[0]), Checkpoint(paths[1])
    released.release()
    delete(put_away(tmp_path, Retention(1, 1), 3))
    assert list(complete_checkpoints(tmp_path)) == [1, 3]
    assert torch.equal(reader.tensor("weights", "a"), torch.ones(3))
    del reader
    delete(put_away(tmp_path, Retention(1, 1), 3))
    assert list(complete_checkpoints(tmp_path)) == [3]


def test_a_clock_that_jumped_changes_neither_what_is_kept_nor_what_is_newest(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step, seconds in ((10, 4e9), (20, 1e9), (30, 0), (40, 2e9)):
        path = write_checkpoint(folder, manifest(step), groups({"a": torch.ones(3)}), World())
        for one in (path, *path.iterdir()):
            os.utime(one, (seconds, seconds))
    assert checkpoint_at(tmp_path) == folder / "step-00000040"
    delete(put_away(folder, Retention(2, 10), 40))
    assert list(complete_checkpoints(folder)) == [30, 40]
    (folder / "step-00000040" / "manifest.json").unlink()
    assert checkpoint_at(tmp_path) == folder / "step-00000030"


def test_what_is_put_away_is_no_checkpoint_and_what_a_kill_leaves_of_it_is_cleared(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, manifest(step), groups({"a": torch.ones(3)}), World())
    old = put_away(tmp_path, Retention(1, 1), 3)
    assert list(complete_checkpoints(tmp_path)) == [3]
    deletion = Deletion(World())
    deletion.begin(old[:1])
    deletion.wait()
    assert [deletion.has_ended(), deletion.has_ended()] == [True, False]
    assert sorted(os.listdir(tmp_path)) == ["step-00000002.old.partial", "step-00000003"]
    clear_unfinished(tmp_path)  # as the next start does
    assert os.listdir(tmp_path) == ["step-00000003"]
