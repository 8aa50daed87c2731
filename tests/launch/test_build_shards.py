"""`vlm data build` understands its options, and says what it built and what it left out."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from data.convert.builder import BuildOptions
from data.convert.source import BuildSource
from launch.build_shards import build_with_progress
from launch.data_commands import build
from tests.data.convert.pictures import read_shards, write_pictures


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_options_reach_the_shards(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 3)
    (tmp_path / "t.tsv").write_text(
        "where\twords\tmore\tclass\n" + "".join(f"00{n}.jpg\tw{n}\tm{n}\t{n}\n" for n in range(3))
    )
    app = typer.Typer()
    app.command()(build)
    options = "--image-column where --caption-column words --caption-column more --label-column class --size 8"
    more = f"--root {tmp_path / 'images'} --quality 70 --samples-per-shard 2 --prefix val --in-order --workers 1"
    result = CliRunner().invoke(app, [str(tmp_path / "t.tsv"), str(tmp_path / "out"), *options.split(), *more.split()])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("3 samples in 2 shards (0.0 MB): ")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["val-000000.tar", "val-000001.tar"]
    samples = read_shards(tmp_path / "out")
    assert [sample["json"]["captions"] for sample in samples] == [[f"w{n}", f"m{n}"] for n in range(3)]
    assert [sample["cls"] for sample in samples] == [b"0", b"1", b"2"]
    assert {(sample["json"]["width"], sample["json"]["height"]) for sample in samples} == {(12, 8)}


def test_what_was_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = write_pictures(tmp_path / "images", 3)
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{name},\n" for name in names[:2]) + "002.jpg,a\n")
    options = BuildOptions(max_bad_share=1)
    build_with_progress(BuildSource(str(tmp_path / "t.csv"), tmp_path / "images"), tmp_path / "out", options, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"2 left out, listed in {tmp_path / 'out' / 'build-ledger.jsonl'}:"
    assert lines[2] == "  2 x it has no caption, or only empty ones"
