"""Every kind of tower: trained, killed, resumed, evaluated, reported, exported; from elsewhere, its source gone."""

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
from timm import create_model

from eval.retrieval import RetrievalConfig
from launch.evaluate import evaluate_model
from launch.export import export_model
from tests.data.small_shards import picture, sample, write_shard
from tests.launch.tiny import assert_same_run, stopped_at, train_here, write_tiny_recipe
from tests.vlm.model.hugging_face import save_text_model, save_vision_model, save_whole
from tests.vlm.model.tiny import TEXTS
from vlm.errors import UserError
from vlm.tensor_file import save_tensors

EMBED_DIM = 8
VISION = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
TIMM = {"timm_model_name": "test_convnext", "timm_model_pretrained": False, "timm_proj": "linear", "timm_pool": ""}
SOURCE = "source"  # where a recipe finds the tower's folder: relative, below the folder in which the run is begun


def architecture(vision: dict[str, Any], text: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"embed_dim": EMBED_DIM, "vision_cfg": vision, "text_cfg": text, **fields}


def towers(image: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    return {"towers": {"embed_dim": EMBED_DIM, "image": image, "text": text}}


def open_clip_name(folder: Path) -> dict[str, Any]:
    (folder / "vlm-tiny-by-name.json").write_text(json.dumps(architecture(VISION, TEXT)))
    open_clip.add_model_config(folder / "vlm-tiny-by-name.json")
    return {"open_clip": "vlm-tiny-by-name"}


def inline(folder: Path) -> dict[str, Any]:
    return {"architecture": architecture(VISION, {**TEXT, "no_causal_mask": True, "pool_type": "last"})}


def timm(folder: Path) -> dict[str, Any]:
    return {"architecture": architecture({**TIMM, "image_size": 32}, TEXT)}


def image_of_transformers(folder: Path) -> dict[str, Any]:
    save_vision_model(folder, "vit")
    return towers({"transformers": SOURCE, "pool": "first"}, {"text_cfg": TEXT})


def text_of_transformers(folder: Path) -> dict[str, Any]:
    save_text_model(folder, "bert")
    return towers({"vision_cfg": VISION}, {"transformers": SOURCE, "context_length": 16})


def text_of_open_clip(folder: Path) -> dict[str, Any]:
    """open_clip's own wrapper of a transformers text model, which open_clip rebuilds from the same folder."""
    save_text_model(folder, "bert")
    text = {"hf_model_name": SOURCE, "hf_tokenizer_name": SOURCE, "hf_proj_type": "linear", "context_length": 16}
    return {"architecture": architecture(VISION, text)}


def clip(folder: Path) -> dict[str, Any]:
    save_whole(folder, "clip")
    return {"transformers": SOURCE}


def siglip(folder: Path) -> dict[str, Any]:
    save_whole(folder, "siglip")
    return {"transformers": SOURCE}


def tower_from_a_file(folder: Path) -> dict[str, Any]:
    save_tensors(folder / "image.safetensors", create_model("test_convnext").state_dict())
    open_clip_name(folder)
    image = {"timm": "test_convnext", "weights": f"{SOURCE}/image.safetensors"}
    return {**towers(image, {"open_clip": "vlm-tiny-by-name"}), "image_size": 32}


def own(folder: Path) -> dict[str, Any]:
    place = "tests.vlm.model.own_towers"
    return towers({f"{place}:OwnImage": {"width": 12}}, {f"{place}:OwnText": {"context_length": 16}})


# Each kind, and what of open_clip's answer to its export begins with: None where it takes it.
LIVES: dict[str, tuple[Any, str | None]] = {
    "open_clip name": (open_clip_name, None),
    "inline": (inline, None),
    "timm": (timm, None),
    "transformers image": (image_of_transformers, "open_clip has no counterpart of the image tower"),
    "transformers text": (text_of_transformers, "open_clip has no counterpart of the text tower"),
    "hf text of open_clip": (text_of_open_clip, "open_clip looks for the text model's configuration in 'source'"),
    "CLIP folder": (clip, "open_clip has no counterpart of the image tower"),
    "tower from a file": (tower_from_a_file, None),
    "own classes": (own, r"open_clip has no counterpart of the image tower \(tests.vlm.model.own_towers:OwnImage\)"),
    "SigLIP folder": (siglip, "open_clip has no counterpart of the image tower"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pairs = [sample(n, jpg=picture(n), txt=f"{TEXTS[n % len(TEXTS)]} {n % 3 * 'red '}") for n in range(24)]
    write_shard(folder / "train-00.tar", pairs)
    write_shard(folder / "test-00.tar", pairs[:10])
    return folder


def figures(model: Path, data: Path) -> dict[str, float]:
    config = RetrievalConfig(kind="retrieval", shards=str(data / "test-*.tar"), batch_size=5)
    return evaluate_model(str(model), config, None, trust=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIVES)
def test_a_whole_life(kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, refusal = LIVES[kind]
    begun, elsewhere = tmp_path / "begun", tmp_path / "elsewhere"
    (begun / SOURCE).mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(begun)
    model = make(begun / SOURCE)
    evaluate = {"pairs": {"kind": "retrieval", "shards": "test-*.tar", "batch_size": 5}}
    sizes = {"duration": "4 steps", "global_batch": 6, "checkpoint_every": "2 steps", "evaluate": evaluate}
    run = tmp_path / "run"
    recipe = write_tiny_recipe(data, run, model=model, **sizes)
    train_here(recipe)

    monkeypatch.chdir(elsewhere)
    shutil.rmtree(begun)
    again = stopped_at(run, 2, tmp_path / "again")
    (again / "report.html").unlink()
    train_here(recipe, (f"run={again}",), resume="auto")
    assert_same_run(again, run)
    found = figures(again, data)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    told = {key.rpartition("/")[2]: value for key, value in last.items() if key.startswith("eval/pairs/")}
    assert told
    assert {key: found[key] for key in told} == pytest.approx(told)
    assert (again / "report.html").stat().st_size > 10_000  # written anew, from elsewhere
    if refusal is not None:
        with pytest.raises(UserError, match=refusal):
            export_model(str(again), "open_clip", tmp_path / "exported", (), trust=True)
        assert not (tmp_path / "exported").exists()
        return
    export_model(str(again), "open_clip", tmp_path / "exported", ())
    assert figures(tmp_path / "exported", data) == pytest.approx(found)
