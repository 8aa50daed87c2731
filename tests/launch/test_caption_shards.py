"""`vlm caption --out`: captions and their figures in copies of shards, on any number of ranks; and training on them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data.images.views import evaluation_view
from launch.caption import caption_pictures, generation_config
from launch.caption_options import CaptionOutputOptions
from launch.caption_shards import caption_shards
from launch.main import app
from launch.model_source import load_model
from tests.data.filter.by_webdataset import read_by_webdataset
from tests.data.small_shards import picture, sample, with_json, write_shard
from tests.eval.test_captioning import likelihood
from tests.launch.small import metrics_of
from tests.launch.test_captioner import MODEL, SHORT, SHORT_CAPTIONS
from tests.launch.tiny import train_here, write_tiny_recipe
from tests.ranks import run_ranks
from vlm.errors import UserError

BEAM = ["--method", "beam", "--beams", "2", "--max-length", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned a little, and three shards of pictures, some without json, one broken."""
    folder = tmp_path_factory.mktemp("captions")
    samples = [with_json(n, captions=[SHORT_CAPTIONS[n % 4]]) for n in range(36)]
    write_shard(folder / "train-00.tar", samples)
    changes = {**SHORT, "objective": {"clip": 1.0, "caption": 2.0}, "duration": "12 steps", "optimizer": {"lr": 0.03}}
    train_here(write_tiny_recipe(folder, folder / "run", model=MODEL, **{**changes, "checkpoint_every": "12 steps"}))
    write_shard(folder / "web-0.tar", samples)
    broken = sample(41, jpg=picture(41)[:90], txt="a broken one")
    write_shard(folder / "web-1.tar", [sample(40, jpg=picture(40), txt="no json"), broken, with_json(42, url="u")])
    write_shard(folder / "web-2.tar", [sample(50 + n, jpg=picture(n), txt="again") for n in range(5)])
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> Any:
    """The command, and what it printed."""
    names = [str(folder / "web-[012].tar"), "--out", str(folder / "out"), "--json", str(folder / "out.jsonl")]
    return CliRunner().invoke(app, ["caption", str(folder / "run"), *names, *BEAM], standalone_mode=False)


def fields_of(shard: Path) -> dict[str, dict[str, Any]]:
    return {str(one["__key__"]): json.loads(one["json"]) for one in read_by_webdataset(shard) if "json" in one}


def test_captions_and_figures_are_those_of_the_model(folder: Path, said: Any) -> None:
    assert said.exception is None, said.output
    rows = [line.split("│")[1:3] for line in said.stdout.splitlines() if "│" in line]
    figures = {name.strip(): value.strip() for name, value in rows}
    assert figures == {"shards": "3", "samples": "44", "captions in generated_captions": "43", "skipped": "1"}
    skipped = [line for line in said.stderr.splitlines() if line.startswith("skipped: ")]
    assert [line.split(": ")[1] for line in skipped] == [f"{folder / 'web-1.tar'} 000041"]
    stored = {key: one for shard in sorted((folder / "out").glob("*.tar")) for key, one in fields_of(shard).items()}
    config = generation_config({"method": "beam", "beams": 2, "max_length": 6})
    plain = caption_pictures(str(folder / "run"), [str(folder / "web-[012].tar")], config)
    assert {one.name: one.caption.text for one in plain} == {
        key: one["generated_captions"][0] for key, one in stored.items()
    }
    model = load_model(str(folder / "run"))
    for key in ("000003", "000040", "000052"):
        (made,) = stored[key]["generated_captions_provenance"]
        (text,) = stored[key]["generated_captions"]
        number = int(key) - 50 if int(key) >= 50 else int(key)
        pixels = torch.from_numpy(evaluation_view(picture(number), model.image_spec).copy()).permute(2, 0, 1)
        assert made["log_likelihood"] == pytest.approx(likelihood(model, pixels, text), abs=2e-4)
        with torch.no_grad():
            cosine = (model.encode_image(pixels[None]) * model.encode_text(*model.tokenizer([text]))).sum()
        assert made["cosine"] == pytest.approx(float(cosine), abs=1e-4)
        assert made["num_tokens"] == int(model.tokenizer([text]).lengths) - 2
        assert (made["method"], made["beams"], made["max_length"]) == ("beam", 2, 6)
        assert len(made["model"]) == 32
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert {one["picture"].rpartition("/")[2]: one["caption"] for one in lines} == {
        key: one["generated_captions"][0] for key, one in stored.items()
    }


def test_a_run_trains_on_people_and_models_by_weight(folder: Path, said: Any, tmp_path: Path) -> None:
    assert said.exception is None
    caption = {"policy": "random", "fields": {"captions": 1, "generated_captions": 3}}
    data = {"root": str(folder / "out"), "sources": {"pairs": {"shards": "web-0.tar"}}, "caption": caption}
    changes = {"duration": "20 steps", "log_every": "20 steps", "checkpoint_every": "20 steps", "record_samples": False}
    changes = {**SHORT, **changes, "objective": {"clip": 1.0, "caption": 2.0}, "data": data}
    train_here(write_tiny_recipe(folder, tmp_path / "run", model=MODEL, **changes))
    line = [line for line in metrics_of(tmp_path / "run") if "data/caption/generated_captions" in line][-1]
    share = line["data/caption/generated_captions"]
    assert share + line["data/caption/captions"] == pytest.approx(1)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / (19 * 7)) ** 0.5


def written(folder: Path, out: Path, batch_size: int) -> dict[str, bytes]:
    config = generation_config({"method": "top_k", "max_length": 6})
    names = [str(folder / "web-[012].tar")]
    caption_shards(str(folder / "run"), names, config, CaptionOutputOptions(out=out), batch_size=batch_size)
    return {path.name: path.read_bytes() for path in [*out.glob("*.tar"), out / "caption-ledger.jsonl"]}


@pytest.mark.slow
def test_neither_ranks_nor_batches_nor_going_on_change_a_byte(folder: Path, tmp_path: Path) -> None:
    alone = written(folder, tmp_path / "alone", 64)
    assert len(alone) == 4
    assert written(folder, tmp_path / "small", 7) == alone
    run_ranks(written, 3, folder, tmp_path / "three", 5, group=False)
    (tmp_path / "three/web-0.tar").unlink()
    (tmp_path / "three/web-2.tar").write_bytes(b"torn")
    assert run_ranks(written, 2, folder, tmp_path / "three", 64, group=False)[0] == alone


def test_a_shard_is_never_replaced_by_its_own_copy(folder: Path, said: Any, tmp_path: Path) -> None:
    """Not even in a folder that the same options wrote, with a copy that is not as it was left."""
    assert said.exception is None
    shutil.copytree(folder / "out", tmp_path / "out")
    with (tmp_path / "out/web-0.tar").open("ab") as file:
        file.write(b"x")
    before = (tmp_path / "out/web-0.tar").read_bytes()
    words = [str(tmp_path / "out/web-[012].tar"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["caption", str(folder / "run"), *words, *BEAM], standalone_mode=False)
    assert isinstance(done.exception, UserError)
    assert str(done.exception).endswith("web-0.tar would be replaced by its own copy; name a new folder")
    assert (tmp_path / "out/web-0.tar").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photo.jpg", "--out", "new"], "--out: photo.jpg is a picture"),
        (["web-0.tar", "--out", "new", "--field", "captions"], "--field: captions is where captions are looked for"),
        (["web-0.tar", "--field", "others"], "--field: means nothing without --out"),
        (["web-0.tar", "--min-score", "0.2"], "--min-score: means nothing without --out"),
        (["web-0.tar", "--out", "run"], "--out: run holds other files"),
        (["web-0.tar", "--out", "."], "--out: ./web-0.tar would be replaced by its own copy"),
        (["pipe:cat web-0.tar", "--out", "new"], "is a command"),
        (["web-0.tar", "--out", "new", "--max-length", "99"], "max_length: found 99"),
    ],
)
def test_wrong_commands_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["caption", "run", *arguments], standalone_mode=False)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (folder / "new").exists()
