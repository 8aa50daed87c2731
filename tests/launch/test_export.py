"""An export needs the checkpoint and nothing else: neither the data nor a word of the run's recipe."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from launch.export import NUM_CHECKED, drawn_images, export_model
from launch.main import app
from launch.model_source import load_model
from tests.launch.saved import save_checkpoint
from tests.vlm.model.tiny import architecture, perturb, some_images, tiny_model
from vlm.errors import UserError
from vlm.model.export_format import EXPORT_FORMATS

OWN_FORMAT = """
from safetensors.torch import load_file, save_file
from vlm.model.exchange import Parity


class Flat:
    def export(self, model, folder, images, captions):
        folder.mkdir()
        save_file(dict(model.state_dict()), folder / "flat.safetensors")
        read = load_file(folder / "flat.safetensors")
        difference = max(float((read[name] - value).abs().max()) for name, value in model.state_dict().items())
        return Parity(difference, difference, len(images), len(captions))


class NotAFormat:
    pass
"""


def test_an_export_needs_no_shards_and_runs_nothing_that_the_recipe_names(tmp_path: Path) -> None:
    model = tiny_model()
    perturb(model)
    run = tmp_path / "run"
    save_checkpoint(run, model)
    ran = tmp_path / "ran"
    sources = {"gone": {"shards": "/nowhere/train-*.tar"}, "command": {"shards": f"pipe:touch {ran}"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump({"data": {"root": "/nowhere", "sources": sources}}))
    parity = export_model(str(run), "open_clip", tmp_path / "out", ())
    assert (parity.num_images, parity.num_texts) == (NUM_CHECKED, NUM_CHECKED)
    assert max(parity.image, parity.text) < 1e-5
    assert json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == 24
    assert not ran.exists()


def test_a_model_with_batch_norm_is_exported_and_measured(tmp_path: Path) -> None:
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    model = tiny_model(architecture=architecture(resnet), freeze_batch_norm=True)
    perturb(model)
    save_checkpoint(tmp_path / "run", model)
    export_model(str(tmp_path / "run"), "open_clip", tmp_path / "out", ())
    images = some_images()
    with torch.no_grad():
        exported = load_model(str(tmp_path / "out")).encode_image(images)
        torch.testing.assert_close(exported, model.eval().encode_image(images))


def test_a_format_of_ones_own_is_named_by_its_class_and_needs_no_change_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    perturb(model)
    save_checkpoint(tmp_path / "run", model)
    (tmp_path / "my_formats.py").write_text(OWN_FORMAT)
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["export", "run", "out", "--to", "my_formats:Flat"])
    assert said.exit_code == 0, said.output
    assert re.search(rf"parity with my_formats:Flat in fp32: images .* 0.0e\+00 \({NUM_CHECKED} checked\)", said.output)
    written = load_file(tmp_path / "out" / "flat.safetensors")
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[name], value) for name, value in model.state_dict().items())
    assert EXPORT_FORMATS.all().keys() == {"open_clip"}
    with pytest.raises(UserError, match=r"^--to: export format 'my_formats:NotAFormat' is not a subclass of"):
        export_model("run", "my_formats:NotAFormat", tmp_path / "other", ())
    assert not (tmp_path / "other").exists()


def test_drawn_pictures_differ_and_stay_the_same() -> None:
    drawn = drawn_images(8, 12)
    assert drawn.shape == (8, 3, 12, 12)
    assert (int(drawn[0].max()), int(drawn[1].min())) == (0, 255)
    assert all(not torch.equal(one, other) for place, one in enumerate(drawn) for other in drawn[:place])
    assert torch.equal(drawn, drawn_images(8, 12))
