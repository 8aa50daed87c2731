"""A model with a captioning decoder: trained, stopped, resumed, evaluated, verified and exported."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.retrieval import RetrievalConfig
from launch.evaluate import evaluate_model
from launch.export import export_model
from launch.recipe import load_recipe
from launch.verify_gradients import verify
from tests.data.small_shards import with_json, write_shard
from tests.launch.small import metrics_of
from tests.launch.tiny import assert_refused, assert_same_run, stopped_at, train_here, train_ranks, write_tiny_recipe
from tests.ranks import run_ranks
from vlm.checkpoint.format import Checkpoint
from vlm.errors import UserError
from vlm.training.engines.registry import EngineName

VISION = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1, "embed_cls": True}
CAPTIONER = {"layers": 2, "heads": 2, "queries": 3, "pooler_heads": 2}
MODEL: dict[str, Any] = {
    "towers": {
        "embed_dim": 8,
        "image": {"vision_cfg": VISION},
        "text": {"text_cfg": {**TEXT, "correct_cls_mask": True}},
    },
    "captioner": CAPTIONER,
}
COCA = {
    "embed_dim": 8,
    "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "text_cfg": TEXT,
    "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
TERMS = {"clip": 1.0, "caption": {"weight": 2.0, "captions": "all", "label_smoothing": 0.1}}
SHORT = {"duration": "6 steps", "checkpoint_every": "3 steps", "global_batch": 7, "objective": TERMS}
SHORT_CAPTIONS = ["red", "a dog on the wet grass", "two cats", "the long street at night, and a bus"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples with one to three captions of unequal length."""
    folder = tmp_path_factory.mktemp("data")
    samples = [
        with_json(n, captions=[f"{SHORT_CAPTIONS[(n + k) % 4]} {n}" for k in range(1 + n % 3)]) for n in range(24)
    ]
    write_shard(folder / "train-00.tar", samples)
    write_shard(folder / "test-00.tar", samples[:10])
    return folder


def recipe(folder: Path, run: Path, **changes: Any) -> str:
    loading = {"caption": {"policy": "all"}, **changes.pop("data", {})}
    return write_tiny_recipe(folder, run, **{"model": MODEL, **SHORT, **changes, "data": loading})


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run) if "loss" in line]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    evaluate = {"pairs": {"kind": "retrieval", "shards": "test-*.tar", "batch_size": 4}}
    train_here(recipe(data, run, evaluate=evaluate, ema={}))
    return run


def test_stopped_and_resumed_it_is_bit_for_bit_the_same(data: Path, alone: Path, tmp_path: Path) -> None:
    stopped_at(alone, 3, tmp_path / "run")
    train_here(str(alone.with_suffix(".yaml")), (f"run={tmp_path / 'run'}",), resume="auto")
    assert_same_run(tmp_path / "run", alone)
    names = Checkpoint(alone / "checkpoints/step-00000006").names("exp_avg")
    assert {name.partition(".")[0] for name in names} >= {"decoder", "image_pooler", "image", "text"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world_size", "changes"),
    [
        ("ddp", 3, {"micro_batch": 1}),
        pytest.param("zero2", 2, {}, marks=pytest.mark.long),
        ("zero3", 2, {"micro_batch": 2}),
        pytest.param("fsdp", 2, {}, marks=pytest.mark.long),
    ],
)
def test_its_losses_are_those_of_one_process(
    data: Path, alone: Path, tmp_path: Path, engine: EngineName, world_size: int, changes: dict[str, Any]
) -> None:
    train_ranks(world_size, recipe(data, tmp_path / "run", engine=engine, ema={}, **changes))
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    terms = [line for line in metrics_of(tmp_path / "run") if "caption" in line]
    for line in terms:
        assert line["loss"] == pytest.approx(line["clip"] + 2 * line["caption"], rel=1e-5)


@pytest.mark.long
def test_sharded_ranks_look_at_a_finer_map_of_a_timm_trunk(data: Path, tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_nfnet", "timm_proj": "linear", "image_size": 32}
    model: dict[str, Any] = {**MODEL, "towers": {**MODEL["towers"], "image": {"vision_cfg": vision}}}
    model["captioner"] = {**CAPTIONER, "pooler": "tower", "feature_map": -2}
    train_here(recipe(data, tmp_path / "alone", model=model))
    for engine in ("zero3", "fsdp"):
        train_ranks(2, recipe(data, tmp_path / engine, model=model, engine=engine, micro_batch=2))
        assert losses(tmp_path / engine) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def verified(name: str) -> bool:
    return verify(load_recipe(name))


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 1), ("fsdp", 2)])
def test_gradients_are_verified(data: Path, tmp_path: Path, engine: EngineName, world_size: int) -> None:
    name = recipe(data, tmp_path / "run", engine=engine, micro_batch=2)
    assert run_ranks(verified, world_size, name, group=False) == [True] * world_size


def test_a_sequential_stream_trains_it(data: Path, tmp_path: Path) -> None:
    objective = {"clip": 1.0, "caption": 2.0}
    sources = {"pairs": {"shards": "train-*.tar", "num_samples": 24}}
    loading = {"mode": "sequential", "caption": {"policy": "first"}, "sources": sources}
    train_here(recipe(data, tmp_path / "run", objective=objective, data=loading, record_samples=False))
    assert len(losses(tmp_path / "run")) == 6


def test_a_decoder_that_no_term_trains_is_told_and_stays(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(recipe(data, tmp_path / "run", objective={"clip": 1.0, "caption": 0.0}))
    assert "model.captioner: no term of the objective trains the decoder" in capsys.readouterr().out
    first, last = (Checkpoint(tmp_path / f"run/checkpoints/step-0000000{step}") for step in (3, 6))
    assert not any(name.startswith("decoder.") for name in last.names("exp_avg"))
    for name in last.names("weights"):
        if name.startswith("decoder."):
            assert torch.equal(first.tensor("weights", name), last.tensor("weights", name))


def test_heads_and_a_decoder_are_read_before_and_after(data: Path, tmp_path: Path) -> None:
    head = {"kind": "linear", "dim": 6}
    one = {"kind": "retrieval", "shards": "test-*.tar", "batch_size": 4}
    evaluate = {"after": one, "before": {**one, "embedding": "before_head"}}
    model = {**MODEL, "image_head": head, "text_head": head}
    train_here(recipe(data, tmp_path / "run", model=model, evaluate=evaluate))
    assert {name for line in metrics_of(tmp_path / "run") for name in line} >= {
        "eval/after/num_images",
        "eval/before/num_images",
    }


def test_it_learns_its_captions(data: Path, tmp_path: Path) -> None:
    train_here(recipe(data, tmp_path / "run", duration="80 steps", optimizer={"lr": 0.03}, checkpoint_every="80 steps"))
    captions = [line["caption"] for line in metrics_of(tmp_path / "run") if "caption" in line]
    assert captions[0] > 10
    assert captions[-1] < 3


@pytest.mark.slow
def test_an_architecture_of_open_clip_trains_and_goes_back(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_here(recipe(data, run, model={"architecture": COCA}))
    config = RetrievalConfig(kind="retrieval", shards=str(data / "test-*.tar"), batch_size=5)
    found = evaluate_model(str(run), config)
    assert found["num_images"] == 10
    parity = export_model(str(run), "open_clip", tmp_path / "exported", [])
    assert max(parity.image, parity.text) <= 1e-5
    assert parity.likelihood is not None
    assert parity.likelihood <= 1e-4
    assert evaluate_model(str(tmp_path / "exported"), config) == pytest.approx(found, abs=1e-6)


def test_poolers_of_the_paper_have_no_counterpart_in_open_clip(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"open_clip has no counterpart of text_cfg\.correct_cls_mask"):
        export_model(str(alone), "open_clip", tmp_path / "exported", [])
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**MODEL, "captioner": "none"}}, "objective.caption: the model has no captioning decoder"),
        ({"data": {"caption": {"policy": "first"}}}, "set data.caption to `all`"),
        ({"model": {**MODEL, "captioner": {**CAPTIONER, "pooler": "cascaded"}}}, "model.captioner"),
        ({"model": {**MODEL, "captioner": {"preset": "giant"}}}, "model.captioner.*preset"),
    ],
)
def test_wrong_recipes_are_one_line(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    name = recipe(data, tmp_path / "run", **changes)
    assert_refused(name, tmp_path / "run", message)
