"""Two small pretrained networks go through a whole life: what they compute stays theirs, wherever they are read from.

Set VLM_TEST_MODELS to a folder that holds `all-MiniLM-L6-v2` (transformers) and `efficientnet-lite0` (timm).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import normalize

from eval.retrieval import RetrievalConfig
from launch.evaluate import evaluate_model
from launch.export import export_model
from launch.model_source import load_model
from tests.data.small_shards import picture, sample, write_shard
from tests.launch.tiny import assert_same_run, stopped_at, train_here, write_tiny_recipe
from tests.vlm.model.tiny import TEXTS, some_images
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.open_clip_names import to_open_clip
from vlm.tensor_file import save_tensors

MODELS = Path(os.environ.get("VLM_TEST_MODELS", "missing"))
LITE0 = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}

pytestmark = pytest.mark.skipif(
    not (MODELS / "all-MiniLM-L6-v2").is_dir(), reason="set VLM_TEST_MODELS to a folder with the two pretrained towers"
)


def described(text: Path, **more: Any) -> ModelConfig:
    text_cfg = {"hf_model_name": str(text), "hf_tokenizer_name": str(text), "hf_proj_type": None, "context_length": 32}
    fields = {"embed_dim": 384, "vision_cfg": LITE0, "text_cfg": text_cfg}
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return ModelConfig.model_validate({"architecture": fields, "freeze_batch_norm": True, **images, **more})


def network(model: DualEncoder) -> nn.Module:
    """The image tower's network without the projection behind it."""
    found = model.image.trunk.trunk
    assert isinstance(found, nn.Module)
    return found


def both_towers(text: Path) -> DualEncoder:
    """The two networks side by side, a new projection behind the pictures' features."""
    model = build_model(described(text))
    stored = load_file(MODELS / "efficientnet-lite0" / "model.safetensors")
    trunk = network(model)
    own = {name: tensor for name, tensor in stored.items() if name in trunk.state_dict()}
    assert len(own) > 200
    trunk.load_state_dict(own)
    return model


@torch.no_grad()
def test_both_networks_compute_here_what_they_compute_at_home(tmp_path: Path) -> None:
    folder = MODELS / "all-MiniLM-L6-v2"
    model = both_towers(folder).eval()
    library = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    hidden, mask = library(**tokens).last_hidden_state, tokens.attention_mask[..., None]
    expected = normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    torch.testing.assert_close(model.encode_text(*model.tokenizer(TEXTS)), expected, rtol=0, atol=1e-5)
    towers = {"embed_dim": 384, "image": {"vision_cfg": LITE0}, "text": {"transformers": str(folder)}}
    as_tower = build_model(ModelConfig.model_validate({"towers": towers, "freeze_batch_norm": True})).eval()
    projection = as_tower.text.projection
    assert isinstance(projection, nn.Linear)
    nn.init.eye_(projection.weight)
    torch.testing.assert_close(as_tower.encode_text(*as_tower.tokenizer(TEXTS)), expected, rtol=0, atol=1e-5)

    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    stored = load_file(MODELS / "efficientnet-lite0" / "model.safetensors")
    theirs.load_state_dict({name: value for name, value in stored.items() if name in theirs.state_dict()})
    features = theirs.eval()((some_images(3, 64) / 255 - 0.5) / 0.5)
    torch.testing.assert_close(network(model)((some_images(3, 64) / 255 - 0.5) / 0.5), features)


def lit(models: Path, **more: Any) -> dict[str, Any]:
    """A recipe's model: the image tower from its file and locked, the text tower as transformers has it."""
    image = {"timm": "tf_efficientnet_lite0", "weights": str(models / "efficientnet-lite0" / "model.safetensors")}
    text = {"transformers": str(models / "all-MiniLM-L6-v2"), "context_length": 32}
    return {"towers": {"embed_dim": 384, "image": image, "text": text}, "lock": {"image": "all"}, **more}


@torch.no_grad()
def test_both_towers_of_a_recipe_have_the_features_of_their_libraries() -> None:
    """Features before the projections, at the size and with the normalisation that the recipe leaves open."""
    model = build_model(ModelConfig.model_validate(lit(MODELS)))
    assert (model.image_spec.size, model.image_spec.mean, model.image_spec.std) == (224, (0.5,) * 3, (0.5,) * 3)
    (notice,) = model.notices
    assert notice.endswith(": left out, for the tower has no such part: classifier.bias, classifier.weight")
    theirs = timm.create_model("tf_efficientnet_lite0")
    theirs.load_state_dict(load_file(MODELS / "efficientnet-lite0" / "model.safetensors"))
    theirs.reset_classifier(0)
    pictures = some_images(4, 224)
    features = theirs.eval()((pictures / 255 - 0.5) / 0.5)
    trunk: Any = model.image.trunk
    expected = features @ trunk.head.proj.weight.T
    torch.testing.assert_close(model.train().image(pictures), expected, rtol=0, atol=1e-5)  # locked: as in evaluation

    folder = MODELS / "all-MiniLM-L6-v2"
    library = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    hidden, mask = library(**tokens).last_hidden_state, tokens.attention_mask[..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    found = model.eval().text(*model.tokenizer(TEXTS))
    text: Any = model.text
    torch.testing.assert_close(found, pooled @ text.projection.weight.T, rtol=0, atol=1e-5)


def test_a_locked_image_tower_is_its_file_after_training_and_needs_it_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, begun, run = tmp_path / "data", tmp_path / "begun", tmp_path / "run"
    write_shard(data / "train-00.tar", [sample(n, jpg=picture(n), txt=TEXTS[n % 4]) for n in range(12)])
    shutil.copytree(MODELS, begun / "models")
    monkeypatch.chdir(begun)
    sizes = {"duration": "4 steps", "global_batch": 4, "checkpoint_every": "2 steps"}
    optimizer = {"lr": 1e-3, "lr_scale": {"text": 0.01}}
    recipe = write_tiny_recipe(data, run, model=lit(Path("models"), image_size=64), optimizer=optimizer, **sizes)
    train_here(recipe)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(begun)
    again = stopped_at(run, 2, tmp_path / "again")
    train_here(recipe, (f"run={again}",), resume="auto")
    assert_same_run(again, run)
    image: Any = load_model(str(again)).image
    trunk = image.trunk.trunk.state_dict()
    stored = load_file(MODELS / "efficientnet-lite0" / "model.safetensors")
    assert len(trunk) > 200
    assert all(torch.equal(tensor, stored[name]) for name, tensor in trunk.items())


def test_they_live_a_whole_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, begun, run = tmp_path / "data", tmp_path / "begun", tmp_path / "run"
    write_shard(data / "train-00.tar", [sample(n, jpg=picture(n), txt=TEXTS[n % 4]) for n in range(12)])
    begun.mkdir()
    monkeypatch.chdir(begun)
    shutil.copytree(MODELS / "all-MiniLM-L6-v2", begun / "text")
    save_tensors(begun / "both.safetensors", to_open_clip(both_towers(Path("text"))), {"format": "pt"})
    model = described(Path("text"), pretrained="both.safetensors").model_dump(mode="json", exclude_none=True)
    evaluate = {"pairs": {"kind": "retrieval", "shards": "train-*.tar", "batch_size": 4}}
    sizes = {"duration": "4 steps", "global_batch": 4, "checkpoint_every": "2 steps", "evaluate": evaluate}
    recipe = write_tiny_recipe(data, run, model=model, optimizer={"lr": 1e-5}, **sizes)
    train_here(recipe)
    export_model(str(run), "open_clip", tmp_path / "exported", ())
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(begun)
    again = stopped_at(run, 2, tmp_path / "again")
    train_here(recipe, (f"run={again}",), resume="auto")
    assert_same_run(again, run)
    config = RetrievalConfig(kind="retrieval", shards=str(data / "train-*.tar"), batch_size=4)
    found = evaluate_model(str(again), config, None)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["image_to_text_r@1"] == pytest.approx(last["eval/pairs/image_to_text_r@1"])
    assert evaluate_model(str(tmp_path / "exported"), config, None) == pytest.approx(found)
    assert load_model(str(again)).files.keys() >= {"text.config.json", "tokenizer.tokenizer.json"}
