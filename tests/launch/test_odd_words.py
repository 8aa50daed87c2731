"""Words on the command line, and data behind them, that no file or model fits: one line that says what was found."""

from pathlib import Path

import pytest
import torch

from launch.export import NUM_CHECKED, export_model
from launch.main import run
from launch.model_source import load_model
from tests.data.small_shards import SAMPLE, picture, sample, write_shard
from tests.launch.saved import save_checkpoint
from tests.vlm.model.tiny import perturb, tiny_model
from vlm.errors import UserError
from vlm.model.dual_encoder import DualEncoder


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    made = tiny_model()
    perturb(made)
    return made


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["vlm", *words])
    with pytest.raises(SystemExit) as caught:
        run()
    return int(caught.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y", f"ViT-B-32:{'y' * 300}"])
def test_a_model_of_a_name_too_long_for_a_path_is_none(name: str) -> None:
    with pytest.raises(UserError, match=r"no such checkpoint|unknown model|neither a file nor a tag"):
        load_model(name)


def test_a_recipe_is_printed_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text("# \x1b]0;mine\x07\u202e\nmodel: {}\n")
    assert said(capsys, monkeypatch, "recipes", str(tmp_path / "a.yaml")) == (
        0,
        "# \\x1b]0;mine\\x07\\u202e\nmodel: {}\n",
        "",
    )
    (tmp_path / "a.tar").write_bytes(b"\xff" * 600)
    code, out, err = said(capsys, monkeypatch, "recipes", str(tmp_path / "a.tar"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "not readable as YAML" in err


def test_an_export_is_checked_on_its_own_texts_where_the_shards_have_none(tmp_path: Path, model: DualEncoder) -> None:
    save_checkpoint(tmp_path / "run", model)
    labelled = write_shard(tmp_path / "labelled.tar", [sample(n, jpg=picture(n), cls=n) for n in range(3)])
    parity = export_model(str(tmp_path / "run"), "open_clip", tmp_path / "out", [str(labelled)])
    assert (parity.num_images, parity.num_texts) == (3, NUM_CHECKED)
    broken = write_shard(tmp_path / "broken.tar", [sample(n, jpg=b"no picture", txt="a") for n in range(3)])
    with pytest.raises(UserError, match=r"^--data: no sample of .*broken\.tar has a picture that can be .*000000: "):
        export_model(str(tmp_path / "run"), "open_clip", tmp_path / "none", [str(broken)])
    assert not (tmp_path / "none").exists()


def test_labels_and_captions_that_cannot_be_used_are_named_with_the_reason(
    tmp_path: Path, model: DualEncoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "run", model)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    named = write_shard(tmp_path / "named.tar", [sample(n, jpg=picture(n), cls="cat") for n in range(3)])
    latin = write_shard(tmp_path / "latin.tar", [sample(n, jpg=picture(n), txt=b"caf\xe9") for n in range(3)])
    words = ("zeroshot", str(tmp_path / "run"), "--classes", str(tmp_path / "names.txt"), "--data", str(named))
    code, _, err = said(capsys, monkeypatch, "eval", *words)
    assert code == 2
    assert "has a label" in err
    assert err.endswith("000000: its cls is no class number but b'cat'\n")
    code, _, err = said(capsys, monkeypatch, "eval", "retrieval", str(tmp_path / "run"), "--data", str(latin))
    assert code == 2
    assert err.endswith("000000: its caption is not UTF-8 (byte 3)\n")


def test_a_collapsed_model_is_drawn(
    tmp_path: Path, model: DualEncoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """t-SNE of one point ends the whole process (a fault of memory in its own code)."""
    flat = tiny_model()
    with torch.no_grad():
        for name, parameter in flat.named_parameters():
            if parameter.ndim > 1 and name != "image.trunk.proj":
                parameter.zero_()
    save_checkpoint(tmp_path / "run", flat)
    shard = write_shard(tmp_path / "a.tar", [sample(n) for n in range(6)])
    words = ("--data", str(shard), "--plots", str(tmp_path / "plots"))
    code, _, _ = said(capsys, monkeypatch, "eval", "geometry", str(tmp_path / "run"), *words)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["clouds.png", "scores.png", "spectra.png"]


def test_file_names_with_dots_are_explained_and_do_not_fill_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dotted: list[SAMPLE] = [
        {"__key__": f"photo{n}", f"{n:03d}.jpg": picture(0), f"{n:03d}.txt": "a"} for n in range(40)
    ]
    shard = write_shard(tmp_path / "a.tar", [*dotted, sample(0)])
    code, out, _ = said(capsys, monkeypatch, "data", "check", str(shard), "--workers", "1", "--no-tokens")
    assert code == 0
    assert "62 more kinds" in " ".join(out.split())
    assert "photo0: it has only 000.jpg, 000.txt; a key ends at the first dot of a file name" in out
    code, out, _ = said(capsys, monkeypatch, "data", "index", str(shard))
    assert "photo0: it has no image, only 000.jpg, 000.txt; a key ends at the first dot" in out


def test_without_a_cache_folder_shards_are_indexed_where_they_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    shard = write_shard(tmp_path / "a.tar", [sample(0)])
    code, _, err = said(capsys, monkeypatch, "data", "index", str(shard))
    assert (code, err) == (0, "")
    assert (tmp_path / "vlm-index.json.gz").is_file()
    monkeypatch.setattr("os.access", lambda *_: False)  # the folder is somebody else's
    code, _, err = said(capsys, monkeypatch, "data", "index", str(shard), "--fresh")
    assert code == 2
    assert "XDG_CACHE_HOME names another cache folder" in err


def test_a_place_for_the_demo_that_is_no_path_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("x" * 300, "s3://bucket/x"):
        code, _, err = said(capsys, monkeypatch, "demo", place)
        assert code == 2
        assert err.startswith("vlm: DIR: ")
