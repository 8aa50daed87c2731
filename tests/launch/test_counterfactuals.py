"""Counting and hard negatives in a run: trained, stopped, resumed, on several ranks, verified, refused where wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data.counterfactuals.editor import CaptionInSample, Editor
from data.counterfactuals.numbers import NUMBERS
from data.randomness import Draws
from launch.recipe import load_recipe
from launch.verify_gradients import verify
from tests.data.small_shards import picture, sample, write_shard
from tests.launch.small import metrics_of
from tests.launch.tiny import (
    assert_refused,
    assert_same_run,
    ledger_of,
    stopped_at,
    train_here,
    train_ranks,
    write_tiny_recipe,
)
from vlm.checkpoint.format import Checkpoint

TERMS = {
    "clip": 1.0,
    "counting": {"weight": 1.0, "scale": "logit_scale", "as_negatives": True},
    "hard_negative_captions": {"form": "margin", "margin": 0.1, "largest_margin": 5.0, "weight": 0.2},
    "hard_negative_images": 0.5,
}
SHORT = {"duration": "6 steps", "checkpoint_every": "3 steps", "global_batch": 7}
SOURCES = {
    "web": {"shards": "train-*.tar", "counterfactuals": "word_order"},
    "counting": {"shards": "counting-*.tar", "counterfactuals": "number", "share": "2/7"},
}
EDITED = {"sources": SOURCES, "degraded": {"by": {"jpeg": {}, "blur": {}}, "share": 0.3}}


class Never(Editor):
    """An editor that promises an edit, and makes only what is true."""

    def applies(self, caption: CaptionInSample) -> bool:
        return True

    def edit(self, caption: CaptionInSample, draws: Draws) -> str:
        return caption.text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a counting set with a sample that cannot be used."""
    folder = tmp_path_factory.mktemp("data")
    captions = [f"a caption with number {n} of many words" for n in range(24)]
    write_shard(folder / "train-0.tar", [sample(n, jpg=picture(n), txt=text) for n, text in enumerate(captions)])
    words = sorted(NUMBERS)
    counting = [sample(n, jpg=picture(n), txt=f"{words[n % 9]} stars") for n in range(100, 111)]
    write_shard(folder / "counting-0.tar", [*counting, sample(111, jpg=b"broken", txt="two stars")])
    return folder


def recipe(folder: Path, run: Path, **changes: Any) -> str:
    fields: dict[str, Any] = {"objective": TERMS, "data": EDITED, **SHORT, **changes}
    return write_tiny_recipe(folder, run, **fields)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    train_here(recipe(data, run))
    return run


def losses(run: Path) -> dict[str, list[float]]:
    logged = [line for line in metrics_of(run) if "loss" in line]
    return {name: [line[name] for line in logged] for name in ("loss", *TERMS)}


def test_the_loss_is_the_sum_of_its_terms_and_the_shares_are_logged(alone: Path) -> None:
    logged = [line for line in metrics_of(alone) if "loss" in line]
    assert len(logged) == 6
    for line in logged:
        terms = (
            line["clip"] + line["counting"] + 0.2 * line["hard_negative_captions"] + 0.5 * line["hard_negative_images"]
        )
        assert line["loss"] == pytest.approx(terms, rel=1e-5)
        assert line["data/source/counting"] == pytest.approx(2 / 7)
        assert line["data/counterfactual/number"] == pytest.approx(2 / 7)
        assert line["data/counterfactual/word_order"] == pytest.approx(5 / 7)
    assert {line["key"] for line in ledger_of(alone)} <= {"000111"}


def test_stopped_and_resumed_it_is_bit_for_bit_the_same(alone: Path, tmp_path: Path) -> None:
    """The margin that follows the model is in the checkpoint."""
    stopped_at(alone, 3, tmp_path / "run")
    train_here(str(alone.with_suffix(".yaml")), (f"run={tmp_path / 'run'}",), resume="auto")
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "engine"), [(2, "zero2"), (3, "fsdp")])
def test_ranks_with_unequal_numbers_of_them_are_the_same_run(
    data: Path, alone: Path, tmp_path: Path, world_size: int, engine: str
) -> None:
    """They go on from the checkpoint of one rank; of two counting samples some rank has none."""
    stopped_at(alone, 3, tmp_path / "run")
    train_ranks(world_size, recipe(data, tmp_path / "run", engine=engine), resume="auto")
    found, expected = losses(tmp_path / "run"), losses(alone)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=2e-5), name


def test_the_gradient_is_verified_in_micro_batches(data: Path, tmp_path: Path) -> None:
    assert verify(load_recipe(recipe(data, tmp_path / "run", micro_batch=2)))


def test_without_counterfactuals_it_is_plain_clip_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """Terms that have nothing to count change no digit: of an editor whose edits are all true."""
    plain = {"sources": {"web": {"shards": "train-*.tar"}}}
    train_here(recipe(data, tmp_path / "plain", objective={"clip": 1.0}, data=plain))
    never = {"editors": {"number": {"kind": "tests.launch.test_counterfactuals:Never"}}}
    terms = {"clip": 1.0, "counting": {"as_negatives": True}}
    train_here(recipe(data, tmp_path / "none", objective=terms, data={**plain, "counterfactuals": never}))
    found, expected = ([line for line in metrics_of(tmp_path / name) if "loss" in line] for name in ("none", "plain"))
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    assert {line["counting"] for line in found} == {0.0}
    ends = [Checkpoint(tmp_path / name / "checkpoints" / "step-00000006") for name in ("none", "plain")]
    assert ends[0].names("weights") == ends[1].names("weights")
    for name in ends[0].names("weights"):
        assert torch.equal(ends[0].tensor("weights", name), ends[1].tensor("weights", name)), name


def test_an_image_tower_that_sees_degraded_copies_alone_is_trained(data: Path, tmp_path: Path) -> None:
    objective = {"robust": {"kind": "clip", "between": ["degraded", "text"]}}
    fields = {"sources": {"web": {"shards": "train-*.tar"}}, "degraded": "blur"}
    train_here(recipe(data, tmp_path / "run", objective=objective, data=fields, duration="2 steps"))
    trained = Checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002").names("exp_avg")
    assert any(name.startswith("image.") for name in trained)
    assert any(name.startswith("text.") for name in trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}}, r"^objective\.counting: the batch brings no counterfactuals; set data\.counterfactuals"),
        (
            {"objective": {"clip": 1.0, "counting": {"editors": ["numbers"]}}},
            r"^objective\.counting\.editors: data\.counterfactuals has no editor 'numbers'; nearest: number",
        ),
        (
            {"objective": {"clip": 1.0}, "providers": {"counterfactual_negatives": {"editors": ["nouns"]}}},
            r"^providers\.counterfactual_negatives\.editors: data\.counterfactuals has no editor 'nouns'",
        ),
        ({"objective": {"counting": {"scale": "logits"}}}, r"objective: counting\.scale"),
        (
            {"data": {"sources": {"web": {"shards": "train-*.tar", "counterfactuals": "number"}}}},
            r"^data\.sources\.web\.counterfactuals: none of the first 24 captions",
        ),
        (
            {"data": {"sources": SOURCES, "degraded": None}},
            r"^objective\.hard_negative_images: the batch brings no degraded; set data\.degraded",
        ),
        (
            {"data": {"counterfactuals": "mine.editors:Own"}},
            r"data\.counterfactuals.*mine\.editors:Own.*--trust",
        ),
    ],
)
def test_wrong_recipes_are_one_line(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert_refused(recipe(data, tmp_path / "run", **changes), tmp_path / "run", message)
