"""Models side by side: similarities are means, all that reads a model reads them, and what cannot be is one line."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from launch.main import app
from launch.model_source import load_model
from tests.launch.saved import save_checkpoint
from tests.launch.small import losses_of, write_data
from tests.launch.tiny import MODEL, stopped_at, train_here, write_tiny, write_tiny_recipe
from tests.vlm.model.hugging_face import save_text_model
from tests.vlm.model.tiny import TEXTS, architecture, perturb, some_images, tiny_model
from vlm.checkpoint.format import Checkpoint
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.join import join

HEADS: dict[str, Any] = {
    "image_head": {"kind": "mlp", "hidden": 20, "dim": 7, "heads": 2},
    "text_head": {"kind": "linear", "dim": 14},
}


def perturbed(seed: int, **fields: Any) -> DualEncoder:
    model = tiny_model(seed, **fields).eval()
    perturb(model, seed)
    return model


def similarities(model: DualEncoder) -> Tensor:
    """Cosines of images and texts in float64, of the embeddings brought to length 1 here."""
    model = model.double()
    with torch.no_grad():
        images = model.encode_image(some_images())
        texts = model.encode_text(*model.tokenizer(TEXTS))
    units = [one / (one * one).sum(1, keepdim=True).sqrt() for one in (images, texts)]
    return units[0] @ units[1].T


def vlm(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), standalone_mode=False)


def test_the_similarity_is_the_mean_of_all_in_float64(tmp_path: Path) -> None:
    """Of towers of other sizes, with heads and without, through the command, the disk and back."""
    wider = architecture({"image_size": 32, "patch_size": 16, "width": 48, "layers": 1, "head_width": 16}, embed_dim=40)
    models = [perturbed(0), perturbed(1, **HEADS), perturbed(2, architecture=wider)]
    names = [str(save_checkpoint(tmp_path / str(number), model)) for number, model in enumerate(models)]
    done = vlm("join", *names, "--out", str(tmp_path / "joined"))
    assert done.exception is None, done.output
    assert "3 models, 78 dimensions" in done.stdout
    joined = load_model(str(tmp_path / "joined"))
    assert joined.embed_dim == 24 + 14 + 40
    torch.testing.assert_close(joined.logit_scale, torch.stack([model.logit_scale for model in models]).mean(0))
    mean = sum(similarities(model) for model in models) / 3
    assert isinstance(mean, Tensor)
    torch.testing.assert_close(similarities(joined), mean, rtol=0, atol=1e-12)
    twice = join({"first": join({"one": models[0], "two": models[1]}), "third": models[2]})  # stage by stage
    assert twice.config == joined.config
    assert all(torch.equal(tensor, joined.state_dict()[name]) for name, tensor in twice.state_dict().items())
    checkpoint = Checkpoint(tmp_path / "joined/checkpoints/step-00000000")
    again = build_model(ModelConfig.model_validate(checkpoint.manifest.model))
    assert again.state_dict().keys() == joined.state_dict().keys()


def test_a_model_beside_itself_ranks_as_alone_and_is_read_by_every_command(tmp_path: Path) -> None:
    write_data(tmp_path)
    name = str(save_checkpoint(tmp_path / "run", perturbed(0)))
    assert vlm("join", name, name, "--out", str(tmp_path / "joined")).exception is None
    found = []
    for model in (name, str(tmp_path / "joined")):
        file = tmp_path / "figures.json"
        words = [model, "--data", str(tmp_path / "test-*.tar"), "--json", str(file), "--batch-size", "32"]
        done = vlm("eval", "retrieval", *words)
        assert done.exception is None, done.output
        found.append({key: value for key, value in json.loads(file.read_text()).items() if key != "model"})
    assert found[0] == found[1]
    out = tmp_path / "embeddings"
    assert vlm("embed", str(tmp_path / "joined"), str(tmp_path / "test-*.tar"), "--out", str(out)).exception is None
    assert json.loads((out / "embeddings.json").read_text())["dims"] == {"image": 48, "text": 48}
    refused = vlm("export", str(tmp_path / "joined"), str(tmp_path / "out"), "--to", "open_clip")
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception) == "open_clip has no counterpart of the image tower (joined)"


def test_a_joined_checkpoint_needs_no_other_file_and_runs_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_text_model(source)
    towers = {"embed_dim": 24, "image": {"vision_cfg": architecture()["vision_cfg"]}}
    hugging_face = {**towers, "text": {"transformers": str(source), "context_length": 16}}
    models = [build_model(ModelConfig.model_validate({"towers": hugging_face}), seed).eval() for seed in (0, 1)]
    perturb(models[1])
    names = [str(save_checkpoint(tmp_path / str(number), model)) for number, model in enumerate(models)]
    shutil.rmtree(source)
    assert vlm("join", *names, "--out", str(tmp_path / "joined")).exception is None
    mean = (similarities(models[0]) + similarities(models[1])) / 2
    torch.testing.assert_close(similarities(load_model(str(tmp_path / "joined"))), mean, rtol=0, atol=1e-12)
    own = {**towers, "text": {"tests.vlm.model.own_towers:OwnText": {}}}
    model = build_model(ModelConfig.model_validate({"towers": own}))
    folder = save_checkpoint(tmp_path / "own", join({"one": model, "two": model}))
    with pytest.raises(UserError, match=r"joined\.members\.0\.tower: .*OwnText.* would run as a program; --trust runs"):
        load_model(str(folder))
    assert load_model(str(folder), trust=True).embed_dim == 48


def test_a_recipe_of_joined_towers_trains_stops_and_goes_on(tmp_path: Path) -> None:
    write_tiny(tmp_path / "data")
    parts = MODEL["architecture"]
    towers: dict[str, Any] = {"embed_dim": 16}
    for name, key in (("image", "vision_cfg"), ("text", "text_cfg")):
        towers[name] = {"joined": {"members": [{"embed_dim": 8, "tower": {key: parts[key]}}] * 2}}
    changes = {
        "model": {"towers": towers, "lock": {"text": "all"}},
        "duration": "4 steps",
        "checkpoint_every": "2 steps",
    }
    recipe = write_tiny_recipe(tmp_path / "data", tmp_path / "run", micro_batch=5, **changes)
    train_here(recipe)
    stopped_at(tmp_path / "run", 2, tmp_path / "again")
    shutil.move(tmp_path / "run", tmp_path / "whole")
    shutil.move(tmp_path / "again", tmp_path / "run")
    train_here(recipe, resume="auto")
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    before, after = (Checkpoint(tmp_path / f"run/checkpoints/step-0000000{step}") for step in (2, 4))
    text, image = "text.members.1.network.text_projection", "image.trunk.members.1.network.proj"
    assert torch.equal(before.tensor("weights", text), after.tensor("weights", text))
    assert not torch.equal(before.tensor("weights", image), after.tensor("weights", image))
    towers["embed_dim"] = 12
    with pytest.raises(UserError, match=r"image\.joined: its members make 8 \+ 8 dimensions, the embedding has 12"):
        build_model(ModelConfig.model_validate({"towers": towers}))


def test_models_that_cannot_be_one_are_one_line(tmp_path: Path) -> None:
    plain = perturbed(0)
    captioned = architecture(multimodal_cfg={"width": 32, "heads": 2, "layers": 1})
    short = architecture(text={"context_length": 12})
    cases: list[tuple[DualEncoder, str]] = [
        (tiny_model(image_size=16), "two: its images have size 16, those of one 32"),
        (tiny_model(interpolation="bilinear"), "two: its images have interpolation bilinear, those of one bicubic"),
        (tiny_model(architecture=short), "two: its tokenizer is not that of one, or makes texts of another length"),
        (tiny_model(init_logit_bias=-10.0), "two has a logit bias, one has none"),
        (
            tiny_model(captioner={"preset": "tiny", "pooler": "single"}),
            r"two: the captioner's pooler \(single\) makes the embedding of images",
        ),
    ]
    for model, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            join({"one": plain, "two": model})
        assert "\n" not in str(caught.value)
    fields = join({"a": plain, "b": plain}).config.model_dump(mode="json")
    headed = build_model(ModelConfig.model_validate({**fields, **HEADS}))
    with pytest.raises(UserError, match="one: it is joined, and has image_head"):
        join({"one": headed, "two": plain})
    fields["towers"]["text"]["joined"]["members"][0]["tower"] = fields["towers"]["text"]
    with pytest.raises(ValueError, match="a joined tower is no member of another"):
        ModelConfig.model_validate(fields)
    joined = join({"one": tiny_model(architecture=captioned), "two": plain})  # a decoder beside it is left out
    assert joined.decoder is None
    name = str(save_checkpoint(tmp_path / "run", plain))
    for words, line in (((name,), "alone is one model"), ((name, str(tmp_path / "none")), "no such checkpoint")):
        error = vlm("join", *words, "--out", str(tmp_path / "joined")).exception
        assert isinstance(error, UserError)
        assert re.search(line, str(error))
        assert not (tmp_path / "joined").exists()
