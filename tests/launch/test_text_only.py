"""A decoder trained on texts alone behind a run's frozen towers: trained, stopped, resumed, evaluated, captioning."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data.loading.heldout import HeldOutSet
from launch.caption import caption_pictures, generation_config
from launch.main import app
from launch.model_source import load_model
from launch.recipe import load_recipe
from launch.train import train
from launch.verify_gradients import verify
from tests.data.small_shards import sample, with_json, write_shard
from tests.launch.small import keys_of, metrics_of
from tests.launch.test_captioner import SHORT_CAPTIONS, TEXT, VISION
from tests.launch.tiny import assert_same_run, stopped_at, train_here, train_ranks, write_tiny_recipe
from vlm.checkpoint.format import Checkpoint
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.gap_statistics import GapStatistics, weights_of

TOWERS = {"embed_dim": 8, "image": {"vision_cfg": VISION}, "text": {"text_cfg": {**TEXT, "embed_cls": False}}}
TERM = {"sight": "text", "captions": "all", "stand_in": "other"}


def text_model(folder: Path, **gap: Any) -> dict[str, Any]:
    gap = {"noise": 0.1, "correction": "mean", "statistics": str(folder / "gap.safetensors"), **gap}
    captioner = {"pooler": "embedding", "layers": 1, "heads": 2, "gap": gap}
    lock = {"image": "all", "text": "all"}
    return {"towers": TOWERS, "pretrained": str(folder / "clip"), "lock": lock, "captioner": captioner}


def recipe(folder: Path, run: Path, **changes: Any) -> str:
    loading = {"images": False, "caption": {"policy": "all"}, "sources": {"texts": {"shards": "text-*.tar"}}}
    evaluate = {"captions": {"kind": "caption", "shards": "pairs-*.tar", "batch_size": 4}}
    values = {
        "model": text_model(folder),
        "objective": {"caption": TERM},
        "duration": "6 steps",
        "checkpoint_every": "3 steps",
        "global_batch": 7,
        "ema": {},
        "evaluate": evaluate,
        **changes,
    }
    return write_tiny_recipe(folder, run, **{**values, "data": {**loading, **changes.get("data", {})}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts without images, some pairs, a model of the pairs, and what its images and texts differ by."""
    folder = tmp_path_factory.mktemp("data")
    captions = [[f"{SHORT_CAPTIONS[(n + k) % 4]} {n}" for k in range(1 + n % 3)] for n in range(24)]
    alone = [with_json(n, captions=captions[n]) for n in range(24)]
    write_shard(folder / "text-00.tar", [{"__key__": one["__key__"], "json": one["json"]} for one in alone])
    write_shard(folder / "text-01.tar", [sample(n, txt=f"a text {n}") for n in range(30, 37)])
    write_shard(folder / "pairs-00.tar", alone[:10])
    pairs = {"sources": {"pairs": {"shards": "pairs-*.tar"}}}
    short = {"model": {"towers": TOWERS}, "duration": "3 steps", "global_batch": 5, "checkpoint_every": "3 steps"}
    train_here(write_tiny_recipe(folder, folder / "clip", **short, data=pairs))
    words = [str(folder / "clip"), str(folder / "pairs-*.tar"), "--out", str(folder / "gap.safetensors")]
    told = CliRunner().invoke(app, ["gap", *words])
    assert told.exit_code == 0, told.output
    assert "mean cosine of a pair" in told.output
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    train_here(recipe(folder, run))
    return run


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run) if "loss" in line]


@torch.no_grad()
def test_statistics_are_of_each_image_with_each_of_its_captions(folder: Path) -> None:
    model = load_model(str(folder / "clip"))
    found = GapStatistics.read(folder / "gap.safetensors", weights_of(model), 8, "gap")
    pairs = HeldOutSet(str(folder / "pairs-*.tar"), model.image_spec)
    (batch,) = pairs.batches(World(), len(pairs))
    images = model.encode_image(batch.images)
    differences = [
        image - model.encode_text(*model.tokenizer([text]))[0]
        for image, texts in zip(images, pairs.captions, strict=True)
        for text in texts
    ]
    rows = torch.stack(differences).double()
    torch.testing.assert_close(found.shift.double(), rows.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.covariance.double(), torch.cov(rows.T, correction=0), rtol=0, atol=1e-6)


def test_towers_stay_and_the_model_is_whole(folder: Path, alone: Path, tmp_path: Path) -> None:
    """Stopped, and without the files that the recipe names, it goes on as if nothing had happened, bit for bit."""
    before = Checkpoint(folder / "clip/checkpoints/step-00000003")
    after = Checkpoint(alone / "checkpoints/step-00000006")
    for name in before.names("weights"):
        assert torch.equal(before.tensor("weights", name), after.tensor("weights", name)), name
    trained = {name.partition(".")[0] for name in after.names("exp_avg")}
    assert trained == {"decoder", "embedding_tokens", "logit_scale"}
    shift = GapStatistics.read(folder / "gap.safetensors", weights_of(load_model(str(folder / "clip"))), 8, "gap").shift
    assert torch.equal(after.tensor("weights", "embedding_tokens.gap.shift"), shift)
    elsewhere = shutil.copytree(folder, tmp_path / "data")
    for name in ("gap.safetensors", "clip"):
        (folder / name).rename(folder / f"{name}.away")
    try:
        stopped_at(alone, 3, tmp_path / "run")
        overrides = (f"run={tmp_path / 'run'}", f"data.root={elsewhere}")
        train_here(str(alone.with_suffix(".yaml")), overrides, resume="auto")
        assert_same_run(tmp_path / "run", alone)
    finally:
        for name in ("gap.safetensors", "clip"):
            (folder / f"{name}.away").rename(folder / name)


def test_it_captions_images(folder: Path, alone: Path, tmp_path: Path) -> None:
    figures = {name for line in metrics_of(alone) for name in line}
    assert {"eval/captions/cider_d", "eval/captions/nll_per_token", "caption"} <= figures
    assert not any(name.startswith("geometry/") for name in figures)
    assert {key for keys in keys_of(alone).values() for key in keys} == {
        f"{n:06d}" for n in [*range(24), *range(30, 37)]
    }
    for number in range(2):
        Image.effect_noise((20, 30), 60 * (number + 1)).convert("RGB").save(tmp_path / f"{number}.png")
    pictures = [str(tmp_path / f"{number}.png") for number in range(2)]
    captioned = caption_pictures(str(alone), pictures, generation_config({"method": "beam", "beams": 2}))
    assert [one.name for one in captioned] == pictures


@pytest.mark.slow
def test_its_losses_are_those_of_one_process(folder: Path, alone: Path, tmp_path: Path) -> None:
    name = recipe(folder, tmp_path / "run", engine="zero3", micro_batch=2)
    train_ranks(2, name)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)


def test_its_gradient_is_verified(folder: Path, tmp_path: Path) -> None:
    assert verify(load_recipe(recipe(folder, tmp_path / "run", micro_batch=3)))


def test_pairs_train_the_same_decoder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = {"images": True, "sources": {"pairs": {"shards": "pairs-*.tar"}}}
    model = {**text_model(folder), "lock": {"text": {"all_but": 1}}}
    objective = {"clip": 1.0, "caption": 2.0, "again": {"kind": "caption", **TERM}}
    short = {"duration": "2 steps", "evaluate": {}}
    train_here(recipe(folder, tmp_path / "run", model=model, objective=objective, data=pairs, **short))
    assert all({"clip", "caption", "again"} <= line.keys() for line in metrics_of(tmp_path / "run") if "loss" in line)
    assert "data.images" not in capsys.readouterr().out
    train_here(recipe(folder, tmp_path / "other", data=pairs, duration="1 step", evaluate={}))
    assert "data.images: no term of the objective looks at images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"clip": 1.0}}, r"^objective\.clip: it reads images, and the data brings none"),
        (
            {"data": {"caption": {"policy": "first"}}},
            r"^objective\.caption: the batch brings no captions; set data\.cap",
        ),
        ({"data": {"images": True}}, r"^data\.sources\.texts\.shards: no image .*text-00\.tar and 1 more"),
    ],
)
def test_wrong_recipes_are_one_line(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(load_recipe(recipe(folder, tmp_path / "run", **changes)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_shipped_recipe_is_one() -> None:
    shipped = load_recipe("text-only-captions", ["data.root=DIR"])
    assert shipped.data.images is False
    assert shipped.model.lock.model_dump() == {"image": "all", "text": "all"}
