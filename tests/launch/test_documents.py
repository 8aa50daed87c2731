"""Documents of texts and images beside pairs: trained, stopped, resumed, on several ranks, and refused where wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.recipe import load_recipe
from launch.verify_gradients import verify
from tests.data.documents import Stored, document, write_documents
from tests.data.small_shards import write_shard, write_source
from tests.launch.small import metrics_of
from tests.launch.test_captioner import MODEL, losses
from tests.launch.tiny import (
    assert_refused,
    assert_same_run,
    ledger_of,
    stopped_at,
    train_here,
    train_ranks,
    write_tiny_recipe,
)
from vlm.errors import UserError

TERMS = {"clip": 1.0, "caption": 2.0, "interleaved": {"weight": 0.5, "label_smoothing": 0.1}}
SHORT = {"duration": "6 steps", "checkpoint_every": "3 steps", "global_batch": 7, "objective": TERMS}
NO_DECODER = {**MODEL, "captioner": "none"}
DOCUMENTS = {"sources": {"web": {"shards": "docs-*.tar"}}, "per_step": 2, "image_text": ":"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and documents of which one cannot be used."""
    folder = tmp_path_factory.mktemp("data")
    write_source(folder, [9, 15], "train")
    write_documents(folder, [5, 6])
    write_shard(folder / "docs-98.tar", [document(50, text="no place for an image")])
    return folder


def recipe(folder: Path, run: Path, documents: dict[str, Any] | None = None, **changes: Any) -> str:
    data = {"documents": {**DOCUMENTS, **(documents or {})}, **changes.pop("data", {})}
    return write_tiny_recipe(folder, run, **{"model": MODEL, **SHORT, **changes, "data": data})


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    train_here(recipe(data, run))
    return run


def documents_of(run: Path) -> dict[int, list[str]]:
    """The keys of the documents of every step, over all ranks."""
    keys: dict[int, list[str]] = {}
    for path in sorted((run / "samples").glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            keys.setdefault(record["step"], []).extend(record["documents"])
    return keys


def test_each_document_comes_once_an_epoch_and_a_bad_one_is_in_the_ledger(alone: Path) -> None:
    keys = documents_of(alone)
    assert sorted(map(len, keys.values())) == [2] * 6
    good = {f"doc{number:04d}" for number in range(11)}
    seen = [key for step in sorted(keys) for key in keys[step]]
    assert good <= set(seen)
    (skip,) = [line for line in ledger_of(alone) if line["source"] == "documents/web"]
    assert "0 places of images, and its json names 3 images" in skip["reason"]
    logged = [line for line in metrics_of(alone) if "loss" in line]
    assert all(line["data/documents/web"] == 1.0 for line in logged)
    for line in logged:
        terms = line["clip"] + 2 * line["caption"] + 0.5 * line["interleaved"]
        assert line["loss"] == pytest.approx(terms, rel=1e-5)


def test_stopped_and_resumed_it_is_bit_for_bit_the_same(alone: Path, tmp_path: Path) -> None:
    stopped_at(alone, 3, tmp_path / "run")
    train_here(str(alone.with_suffix(".yaml")), (f"run={tmp_path / 'run'}",), resume="auto")
    assert_same_run(tmp_path / "run", alone)
    assert documents_of(tmp_path / "run") == documents_of(alone)


def test_what_is_bad_among_documents_is_a_share_of_them_and_the_pairs(tmp_path: Path) -> None:
    """11 of 1,124 are less than the share allowed, of the 24 pairs alone they would be more."""
    write_source(tmp_path, [24], "train")
    one = document(0)
    documents: list[Stored] = [{**one, "__key__": f"d{number}"} for number in range(1089)]
    bad: list[Stored] = [{"__key__": f"x{number}", "cls": 1} for number in range(11)]
    write_shard(tmp_path / "docs-00.tar", [*documents, *bad])
    train_here(recipe(tmp_path, tmp_path / "run", duration="1 steps", data={"max_bad_share": 0.01}))
    assert len(ledger_of(tmp_path / "run")) == 11


@pytest.mark.slow
def test_on_ranks_without_a_document_it_is_the_same_run(data: Path, alone: Path, tmp_path: Path) -> None:
    """Three ranks share two documents a step; they go on from the checkpoint of one, under another engine."""
    stopped_at(alone, 3, tmp_path / "run")
    name = recipe(data, tmp_path / "run", engine="fsdp")
    train_ranks(3, name, resume="auto")
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    together = {step: sorted(keys) for step, keys in documents_of(tmp_path / "run").items()}
    assert together == {step: sorted(keys) for step, keys in documents_of(alone).items()}


def test_the_gradient_is_verified(data: Path, tmp_path: Path) -> None:
    assert verify(load_recipe(recipe(data, tmp_path / "run", micro_batch=2)))


def test_it_learns_its_documents(data: Path, tmp_path: Path) -> None:
    """With the contrastive term alone beside it."""
    data_fields = {"max_bad_share": 1.0}
    fields = {"duration": "60 steps", "checkpoint_every": "60 steps", "optimizer": {"lr": 0.03}}
    objective = {"clip": 1.0, "interleaved": 1.0}
    documents = {"images_seen": "all", "per_step": 9}
    train_here(recipe(data, tmp_path / "run", documents, objective=objective, data=data_fields, **fields))
    told = [line["interleaved"] for line in metrics_of(tmp_path / "run") if "interleaved" in line]
    assert told[0] > 10
    assert told[-1] < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": NO_DECODER, "objective": {"clip": 1.0, "interleaved": 1.0}},
            "objective.interleaved: the model has no captioning decoder",
        ),
        ({"data": {"documents": None}}, "objective.interleaved: the batch brings no documents; set data.documents"),
        ({"data": {"mode": "sequential"}}, "documents need mode: indexed"),
        ({"documents": {"images_seen": "first"}}, "data.documents.images_seen.*'last' or 'all'"),
        ({"documents": {"per_step": 0}}, "data.documents.per_step"),
        (
            {"documents": {"max_tokens": 17}},
            "data.documents.max_tokens: 17 is more than the text tower's context of 16",
        ),
    ],
)
def test_wrong_recipes_are_one_line(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    name = recipe(data, tmp_path / "run", **changes)
    assert_refused(name, tmp_path / "run", message)


def test_moved_documents_are_gone_on_with_and_others_are_refused(data: Path, alone: Path, tmp_path: Path) -> None:
    stopped_at(alone, 3, tmp_path / "run")
    options = (f"run={tmp_path / 'run'}", f"data.root={tmp_path}")
    write_source(tmp_path, [9, 15], "train")
    write_documents(tmp_path, [5, 6])
    write_shard(tmp_path / "docs-98.tar", [document(50, text="other words, and no place for an image")])
    with pytest.raises(UserError, match="documents/web holds other samples or texts"):
        train_here(str(alone.with_suffix(".yaml")), options, resume="auto")
    write_shard(tmp_path / "docs-98.tar", [document(50, text="no place for an image")])
    train_here(str(alone.with_suffix(".yaml")), options, resume="auto")
    assert losses(tmp_path / "run") == losses(alone)
