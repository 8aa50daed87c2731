"""Where a command writes is checked before its work: one line, exit code 2, nothing made, nothing replaced."""

import os
from pathlib import Path

import pytest

from launch.main import run
from tests.data.small_shards import sample, write_shard
from tests.eval.runs import logged, write_run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a shard, a run, and things that no output may replace; the current folder."""
    write_shard(tmp_path / "a.tar", [sample(0)])
    (tmp_path / "table.csv").write_text("image,caption\nnone.jpg,a dog\n")
    write_run(tmp_path / "run", [logged(10, 2.5)])
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere/x")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder, with the text of what is a file."""
    return {
        str(path.relative_to(folder)): path.read_text(errors="replace") if path.is_file() else str(path.lstat().st_mode)
        for path in sorted(folder.rglob("*"))
    }


# Commands up to the place; a model that is not there shows that the place was looked at first.
FILES = {
    "--json": [
        "eval retrieval no/model --data a.tar --json",
        "data check a.tar --json",
        "data filter a.tar --out new --json",
    ],
    "--out": ["report run --out"],
}
FOLDERS = {
    "--plots": ["eval geometry no/model --data a.tar --plots", "data check a.tar --plots"],
    "--out": ["data filter a.tar --out"],
    "--work": ["data filter a.tar --out new --work"],
    "OUT_DIR": ["data build table.csv"],
    "run": ["train scenes data.root=. run="],
}
NEW_FOLDERS = {"scenes": ["data scenes"], "export": ["export no/model --to open_clip"]}
ADDRESSES = ["s3://bucket/x", "gs://bucket/x", "http://host/x", "memory://x", "pipe:cat"]
BAD_FILES = ["full", "none/x", "file/x", "dangling", *ADDRESSES, "", "x" * 300, "a\nb"]
BAD_FOLDERS = ["file", "file/x", "dangling", "fifo", "/dev/null", "/proc/x", *ADDRESSES, "x" * 300]


def cases(commands: dict[str, list[str]], places: list[str]) -> list[tuple[str, str, str]]:
    return [(command, blamed, bad) for blamed, several in commands.items() for command in several for bad in places]


@pytest.mark.parametrize(
    ("command", "blamed", "bad"),
    [*cases(FILES, BAD_FILES), *cases(FOLDERS, BAD_FOLDERS), *cases(NEW_FOLDERS, [*BAD_FOLDERS, "full"])],
)
def test_a_place_that_cannot_be_written_is_refused_first(
    place: Path,
    command: str,
    blamed: str,
    bad: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(place)
    arguments = command.split()
    arguments = [*arguments[:-1], arguments[-1] + bad] if command.endswith("=") else [*arguments, bad]
    monkeypatch.setattr("sys.argv", ["vlm", *arguments])
    with pytest.raises(SystemExit) as ended:
        run()
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("vlm: ")]
    assert (ended.value.code, len(lines)) == (2, 1), said
    assert blamed in lines[0]
    assert lines[0].isprintable()
    assert contents(place) == before


@pytest.mark.parametrize(
    ("command", "blamed"),
    [
        ("report s3://b/run", "RUN"),
        ("report run s3://b/run", "RUN"),
        ("data build s3://b/t.csv new", "SOURCE"),
        ("data build table.csv new --root s3://b/x", "--root"),
        ("data build . new --captions gs://b/x.csv", "--captions"),
        ("data filter a.tar --out new --counts s3://b/x", "--counts"),
        ("verify-gradients scenes --checkpoint s3://b/x", "--checkpoint"),
        ("train scenes data.cache.folder=s3://b/cache", "data.cache.folder"),
        ("data check ftp://no-such-host.invalid/a.tar", "SHARDS"),
    ],
)
def test_an_address_where_a_path_is_read_is_said_to_be_one(
    place: Path, command: str, blamed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place)
    monkeypatch.setattr("sys.argv", ["vlm", *command.split()])
    with pytest.raises(SystemExit) as ended:
        run()
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert blamed in said
    assert "but an address" in said or "ftp" in said
    assert contents(place) == before


def test_a_report_goes_through_what_its_name_leads_to(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "real.html").write_text("old")
    (place / "link.html").symlink_to("real.html")
    for out in ("link.html", "/dev/null"):
        monkeypatch.setattr("sys.argv", ["vlm", "report", "run", "--out", out])
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code in (0, None), capsys.readouterr()
    assert (place / "link.html").is_symlink()
    assert (place / "real.html").read_text().startswith("<!DOCTYPE html>")
    assert Path("/dev/null").is_char_device()
    # Without --out the page belongs to the run, and does not leave it.
    (place / "run" / "report.html").symlink_to(place / "file")
    monkeypatch.setattr("sys.argv", ["vlm", "report", "run"])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    assert "report.html is a link that leads out of run" in capsys.readouterr().err
    assert (place / "file").read_text() == "mine"
