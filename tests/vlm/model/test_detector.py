"""Detectors of transformers: they see what the library sees, and nothing in their folder runs or leads away."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.data.counting.tiny_detector import save_tiny_detector, seen_by_library
from tests.data.small_shards import picture
from vlm.errors import UserError
from vlm.model.detector import UndetectableError, load_detector


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_detector(tmp_path / "detector")


def test_it_counts_as_the_library_does_with_each_picture_by_itself(folder: Path) -> None:
    detector = load_detector(folder, "--detector")
    pictures = [picture(number, (64, 32)) for number in range(5)]
    pixels = [np.array(Image.open(io.BytesIO(stored)).convert("RGB")) for stored in pictures]
    for min_score in (0.5, 0.7):
        counts = detector.counts([detector.prepared(one) for one in pixels], min_score)
        seen = seen_by_library(folder, pictures, min_score)
        assert counts == seen
        assert len({tuple(one.values()) for one in seen}) > 2


def test_classes_without_a_name_of_their_own_go_by_their_number(folder: Path) -> None:
    pixels = np.array(Image.open(io.BytesIO(picture(0, (64, 32)))).convert("RGB"))
    (seen,) = seen_by_library(folder, [picture(0, (64, 32))])
    assert set(seen) == {"cat", "cup"}
    change_json(folder / "config.json", id2label={"0": "N/A", "1": "N/A", "2": "\ud800cup"})
    detector = load_detector(folder, "--detector")
    assert detector.counts([detector.prepared(pixels)], 0.5) == [{"1": seen["cat"], "?cup": seen["cup"]}]


def test_its_identity_is_that_of_weights_and_processor(folder: Path) -> None:
    first = load_detector(folder, "--detector").identity
    assert load_detector(folder, "--detector").identity == first
    change_json(folder / "preprocessor_config.json", size={"shortest_edge": 48, "longest_edge": 64})
    second = load_detector(folder, "--detector").identity
    change_weights(folder, lambda weights: weights["vit.embeddings.cls_token"].add_(1))
    assert len({first, second, load_detector(folder, "--detector").identity}) == 3


def change_json(path: Path, **changes: Any) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_code_that_a_folder_names_never_runs(folder: Path, tmp_path: Path) -> None:
    code = {"AutoModelForObjectDetection": "mine.Mine", "AutoImageProcessor": "mine.Mine", "AutoConfig": "mine.Mine"}
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    before = load_detector(folder, "--detector").identity
    for name in ("config.json", "preprocessor_config.json"):
        change_json(folder / name, auto_map=code)
    assert load_detector(folder, "--detector").identity == before
    assert not (tmp_path / "ran").exists()


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda at: (at / "config.json").unlink(), "there is no config.json"),
    "no processor": (lambda at: (at / "preprocessor_config.json").unlink(), "there is no preprocessor_config.json"),
    "pickle": (
        lambda at: (at / "model.safetensors").rename(at / "pytorch_model.bin"),
        "holds no weights as safetensors",
    ),
    "no detector": (
        lambda at: change_json(at / "config.json", model_type="vit"),
        "model_type 'vit' detects no objects (",
    ),
    "unknown kind": (
        lambda at: change_json(at / "config.json", model_type="yolo"),
        "model_type 'yolo' detects no objects (nearest: yolos",
    ),
    "missing weight": (
        lambda at: change_weights(at, lambda weights: weights.pop("vit.embeddings.cls_token")),
        "its files hold no weights for vit.embeddings.cls_token",
    ),
    "other weight": (
        lambda at: change_json(at / "config.json", id2label={"0": "dog"}),
        "class_labels_classifier.layers.2.bias is [4] in its files but [2]",
    ),
    "backbone": (
        lambda at: change_json(at / "config.json", backbone="gpt2"),
        "config.json: backbone: 'gpt2' lies elsewhere, and is not followed",
    ),
    "inner backbone": (
        lambda at: change_json(at / "config.json", backbone_config={"model_type": "rt_detr", "backbone": "gpt2"}),
        "config.json: backbone: 'gpt2' lies elsewhere, and is not followed",
    ),
    "hub": (lambda at: change_json(at / "config.json", backbone="a/b"), "backbone: 'a/b' leads out of the model"),
    "other processor": (
        lambda at: change_json(at / "preprocessor_config.json", image_processor_type="ViTImageProcessor"),
        "its image processor, ViTImageProcessor, is none of a detector",
    ),
    "endless pictures": (
        lambda at: change_json(at / "preprocessor_config.json", size={"height": 10**9, "width": 10**9}),
        "size.height: found 1000000000; at most 16,384",
    ),
    "no numbers": (
        lambda at: change_weights(at, lambda weights: weights["vit.embeddings.cls_token"].fill_(float("nan"))),
        "of a grey picture, the detector's scores are no numbers",
    ),
    "damaged": (lambda at: (at / "model.safetensors").write_bytes(b"\x00" * 64), "--detector "),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_detector_of_its_own_is_one_line(folder: Path, case: str) -> None:
    change, message = REFUSALS[case]
    change(folder)
    with pytest.raises(UserError) as caught:
        load_detector(folder, "--detector")
    assert str(caught.value).startswith(f"--detector {folder}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_that_it_cannot_take_says_so_alone(folder: Path) -> None:
    detector = load_detector(folder, "--detector")
    with pytest.raises(UndetectableError, match="the detector fails: "):
        detector.prepared(np.zeros((1, 4000, 3), dtype=np.uint8))
    assert detector.prepared(np.zeros((8, 4, 3), dtype=np.uint8))


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--detector .*/none: there is no such folder"):
        load_detector(tmp_path / "none", "--detector")
