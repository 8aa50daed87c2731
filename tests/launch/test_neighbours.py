"""Runs on batches of neighbours: trained, stopped, resumed on any ranks, with bad samples replaced; and refusals."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from launch.recipe import load_recipe
from launch.train import train
from tests.data.neighbours.folders import source_of, write_neighbours
from tests.launch.small import keys_of
from tests.launch.tiny import (
    assert_refused,
    assert_same_run,
    ledger_of,
    sets_of,
    stopped_at,
    train_here,
    train_ranks,
    write_tiny,
    write_tiny_recipe,
)
from vlm.checkpoint.format import Checkpoint
from vlm.errors import UserError

COUNTS = [17, 5, 25, 4]
KEYS = [*range(47), 47, 100, 101, 102]


def clusters(kind: int = 2) -> list[NDArray[np.int64]]:
    """A cluster a key by its remainder; of the bad samples too, that they may come up."""
    return [np.asarray(keys) % kind for keys in np.split(np.asarray(KEYS), np.cumsum(COUNTS)[:-1])]


def write_labels(folder: Path, shards: Path, kind: int = 2) -> Path:
    folder.mkdir()
    groups = [one // 4 for one in np.split(np.arange(len(KEYS)), np.cumsum(COUNTS)[:-1])]
    contents = source_of(str(shards / "train-*.tar")).contents
    write_neighbours(folder, contents, clusters(kind), groups if kind == 2 else None, 4 if kind == 2 else None)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps, three epochs of four batches, over `data` and `labels` beside it."""
    folder = tmp_path_factory.mktemp("whole")
    write_tiny(folder / "data")
    write_labels(folder / "labels", folder / "data")
    train_here(recipe(folder, folder / "run"))
    return folder


def recipe(folder: Path, run: Path, labels: str = "labels", by: str = "cluster", **changes: Any) -> str:
    neighbours = {"labels": str(folder / labels), "by": by}
    data = {"sources": {"pairs": {"shards": "train-*.tar", "neighbours": neighbours}}, "max_bad_share": 0.2}
    return write_tiny_recipe(folder / "data", run, **{**changes, "data": {**data, **changes.get("data", {})}})


def test_each_batch_is_of_one_cluster_and_so_is_what_stands_in(whole: Path) -> None:
    batches = keys_of(whole / "run")
    assert len(batches) == 12
    for keys in batches.values():
        assert len({int(key) % 2 for key in keys}) == 1
        assert len(set(keys)) >= 11  # two bad samples of one batch may get one substitute
    for epoch in range(3):
        ones = [int(batches[step + 1][0]) % 2 for step in range(4 * epoch, 4 * epoch + 4)]
        assert sum(ones) == 2
    skipped = ledger_of(whole / "run")
    assert {line["key"] for line in skipped if line["substitute"]} >= {"000101"}
    bad = {"000100", "000101", "000102"}
    assert not bad & {key for keys in batches.values() for key in keys}


def test_moved_data_and_labels_go_on_bit_for_bit_and_on_other_ranks(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("data", "labels"):
        shutil.copytree(whole / name, tmp_path / name)
    for run in ("alone", "ranks"):
        stopped_at(whole / "run", 6, tmp_path / run)
    train_here(recipe(tmp_path, tmp_path / "alone"), resume="auto")
    assert "; goes on from step 6; pairs in batches by cluster" in capsys.readouterr().out
    assert_same_run(tmp_path / "alone", whole / "run")
    train_ranks(3, recipe(tmp_path, tmp_path / "ranks"), resume="auto")
    assert sets_of(tmp_path / "ranks") == sets_of(whole / "run")


def test_other_labels_are_refused_and_no_flag_hides_them(whole: Path, tmp_path: Path) -> None:
    write_labels(tmp_path / "others", whole / "data", kind=3)
    stopped_at(whole / "run", 6, tmp_path / "run")
    shutil.copytree(whole / "data", tmp_path / "data")
    record = Checkpoint(tmp_path / "run/checkpoints/step-00000006").manifest.data["pairs"]
    assert record.neighbours.startswith("cluster ")
    words = f"the data has changed since the checkpoint: pairs had batches of the neighbours {record.neighbours}"
    shutil.copytree(whole / "labels", tmp_path / "labels")
    for changes in ({"labels": "others"}, {"by": "group"}, {"data": {"sources": {"pairs": {"shards": "train-*.tar"}}}}):
        name = recipe(tmp_path, tmp_path / "run", **changes)
        with pytest.raises(UserError) as caught:
            train(load_recipe(name), resume="auto", allow_changes=True)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "none"}, r"data.sources.pairs.neighbours.labels: .*none has no neighbours.json"),
        ({"labels": "three", "by": "group"}, r"neighbours.by: .*three has clusters alone"),
        ({"labels": "three", "global_batch": 18}, "the largest cluster has 17 samples, fewer than the 18 that a batch"),
        ({"by": "group", "global_batch": 6}, "groups of 4 do not divide the global batch of 6"),
        ({"labels": "short"}, r"short (knows nothing of what|was made of other samples or texts than) train-98.tar"),
    ],
)
def test_what_cannot_be_exact_is_one_line(whole: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if not (whole / "three").exists():
        write_labels(whole / "three", whole / "data", kind=3)
        (whole / "short").mkdir()
        contents = source_of(str(whole / "data/train-0*.tar")).contents
        write_neighbours(whole / "short", contents, clusters()[:3])
    assert_refused(recipe(whole, tmp_path / "run", **changes), tmp_path / "run", message)


def test_a_recipe_that_cannot_keep_the_promise_is_refused(whole: Path, tmp_path: Path) -> None:
    near = {"shards": "train-*.tar", "neighbours": {"labels": "labels"}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mode": "sequential"}, "`mode: sequential` streams shards as they are; sources.pairs.neighbours needs"),
        ({"mix": "once", "sources": {"pairs": near, "more": {"shards": "train-00.tar"}}}, "sources.pairs.neighbours"),
        ({"sources": {"pairs": {**near, "neighbours": {"labels": "labels", "by": "groups"}}}}, "neighbours.by: "),
    ]
    for data, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            load_recipe(recipe(whole, tmp_path / "run", data=data))
        assert "\n" not in str(caught.value)
