"""Text becomes a path only where that can harm nothing: names, paths of users, reads below a folder, outputs."""

import os
import threading
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from vlm.config import Config, first_problem
from vlm.errors import UserError
from vlm.paths import (
    Named,
    address_kind,
    below,
    local_path,
    output_file,
    output_folder,
    require_name,
    require_names,
    write_output,
)
from vlm.programs import programs


class Holder(Config):
    """A recipe with a mapping by name."""

    parts: Named[int] = Field(default={})


@pytest.mark.parametrize("name", ["a", "A1", "test-2.b_c", "0", "report", "examples", "a..b", "x" * 100])
def test_a_name_may_be_part_of_a_path(name: str) -> None:
    assert require_name(name) == name
    assert Holder(parts={name: 1}).parts == {name: 1}


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", ".hidden", "-rf", "_a", "a/b", "../a", "/etc", "a\\b", "a b", "a\n", "a\x00", "\x1b[31m", "é"),
        *("٣", "a:b", "a*", "s3://a", "x" * 101, 3, None, True),
    ],
)
def test_everything_else_is_refused_where_a_recipe_is_read(name: object) -> None:
    with pytest.raises(UserError, match="may become a file name"):
        require_name(name)
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"parts": {name: 1}})
    line = first_problem(caught.value, Holder)
    assert line.startswith("parts: the name ")
    assert line.isprintable()


def test_names_that_one_disk_in_two_takes_for_one_are_refused() -> None:
    require_names(["a", "b", "ab"])
    with pytest.raises(UserError, match="Test and test differ only in case"):
        require_names(["Test", "a", "test"])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *(("s3://b/x", "s3"), (Path("s3://b/x"), "s3"), ("S3://b", "S3"), ("gs:/b", "gs"), ("memory://x", "memory")),
        *(
            ("http://h/x", "http"),
            ("file:///x", "file"),
            ("pipe:cat x", "pipe"),
            ("simplecache::s3://b", "simplecache"),
        ),
        *(("a/b", None), ("/a:b", None), ("a:b", None), ("./s3:/b", None), ("x y://b", None), ("C:/a", None)),
    ],
)
def test_an_address_is_no_path(text: str | Path, kind: str | None) -> None:
    assert address_kind(text) == kind
    if kind is not None:
        with pytest.raises(UserError, match=rf"^run: .*no local path but an address \({kind}\)"):
            local_path(text, "run")


@pytest.mark.parametrize(
    "text", ["", "a\nb", "a\x00", "\x1b]0;x\x07", "x" * 256, "é" * 128, "a/\ud800", "~nobody-here/x"]
)
def test_what_no_disk_takes_is_no_path(text: str) -> None:
    with pytest.raises(UserError, match=r"^run: ") as caught:
        local_path(text, "run")
    assert str(caught.value).isprintable()


def test_a_path_is_taken_as_the_shell_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/runs/a", "run") == Path("/home/me/runs/a")
    assert local_path("runs/a [1] {b}", "run") == Path("runs/a [1] {b}")


class TestBelow:
    """Names out of a file's own data."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "run"
        (folder / "sub").mkdir(parents=True)
        (folder / "in.txt").write_text("in")
        (tmp_path / "out.txt").write_text("out")
        (folder / "link-in").symlink_to("in.txt")
        (folder / "link-out").symlink_to("../out.txt")
        (folder / "up").symlink_to("..")
        (folder / "loop").symlink_to("loop")
        os.mkfifo(folder / "fifo")
        return folder

    @pytest.mark.parametrize("name", ["in.txt", "sub/none", "none", "./in.txt", "link-in"])
    def test_files_of_the_folder_are_given(self, folder: Path, name: str) -> None:
        assert below(folder, name, "here") == folder / name
        (folder.parent / "also").symlink_to(folder)  # the folder itself may be reached by a link
        assert below(folder.parent / "also", name, "here") == folder.parent / "also" / name

    @pytest.mark.parametrize(
        "name",
        [
            *("", ".", "..", "../out.txt", "sub/../../out.txt", "/etc/passwd", "link-out", "up/out.txt", "a\x00"),
            *("loop", "fifo", "sub", "x" * 300, "\x1b[2J"),
        ],
    )
    def test_nothing_else_is(self, folder: Path, name: str) -> None:
        with pytest.raises(UserError, match=r"^here: "):
            below(folder, name, "here")


class TestOutputs:
    """Outputs are asked for before the work, and written after it."""

    def test_a_file_is_written_whole_and_a_link_followed(self, tmp_path: Path) -> None:
        (tmp_path / "far").mkdir()
        (tmp_path / "link").symlink_to("far/real.json")
        for _ in range(2):  # not there, then there
            path = output_file(tmp_path / "link", "--json")
            write_output(path, "café", "--json")
            assert (tmp_path / "link").is_symlink()
            assert (tmp_path / "far" / "real.json").read_bytes() == "café".encode()
        assert [entry.name for entry in (tmp_path / "far").iterdir()] == ["real.json"]

    def test_a_fifo_gets_it_and_stays(self, tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        write = output_file(fifo, "--json")
        with pytest.raises(UserError, match="nobody reads this FIFO"):
            write_output(write, "x", "--json")
        content = b"x" * 1_000_000  # more than a pipe holds
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
        reader.start()
        while True:
            try:
                write_output(write, content, "--json")
                break
            except UserError:
                continue  # the reader is not there yet
        reader.join(timeout=60)
        assert got == [content]
        assert fifo.is_fifo()

    def test_a_device_stays_one(self, tmp_path: Path) -> None:
        write_output(output_file("/dev/null", "--json"), "x", "--json")
        assert Path("/dev/null").is_char_device()
        with pytest.raises(UserError, match="--json: /dev/full cannot be written: No space left"):
            write_output(output_file("/dev/full", "--json"), "x", "--json")
        assert Path("/dev/full").is_char_device()
        reading, writing = os.pipe()  # as the shell's >(...) names it
        with os.fdopen(reading, "rb") as file:
            write_output(output_file(f"/dev/fd/{writing}", "--json"), "through", "--json")
            os.close(writing)
            assert file.read() == b"through"

    def test_what_cannot_be_written_is_refused_before_the_work(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("kept")
        (tmp_path / "dangling").symlink_to("nowhere/x")
        (tmp_path / "loop").symlink_to("loop")
        places: list[Path | str] = [
            tmp_path,
            tmp_path / "none" / "x",
            tmp_path / "file" / "x",
            tmp_path / "dangling",
            tmp_path / "loop",
        ]
        for place in [*places, "/proc/none", "s3://b/x", ""]:
            with pytest.raises(UserError, match=r"^--json"):
                output_file(place, "--json")
        os.mkfifo(tmp_path / "fifo")
        places = [tmp_path / "file", tmp_path / "file" / "x", tmp_path / "fifo", tmp_path / "dangling"]
        for place in [*places, "/proc/none", "/dev/null", "gs://b/x", ""]:
            with pytest.raises(UserError, match=r"^--plots"):
                output_folder(place, "--plots")
        with pytest.raises(UserError, match=r"^--plots .*there is no folder"):
            output_folder(tmp_path / "none" / "x", "--plots", parents=False)
        assert (tmp_path / "file").read_text() == "kept"

    def test_asking_makes_nothing(self, tmp_path: Path) -> None:
        output_file(tmp_path / "a", "--json")
        output_folder(tmp_path / "b", "--plots")
        output_folder(tmp_path / "c" / "d", "--out")
        assert not list(tmp_path.iterdir())


def test_programs_of_a_recipe_are_found_wherever_they_stand() -> None:
    recipe = {
        "objective": {"clip": {"weight": 1.0}, "mine.terms:Pull": 1.0},
        "data": {
            "root": "pipe:cat",
            "sources": {
                "a": {"shards": ["x.tar", " pipe:curl x"]},
                "b": {"shards": "s3://b", "counterfactuals": ["number", "mine.editors:List"]},
            },
            "counterfactuals": {
                "editors": {"mine.editors:Own": {}, "x": {"kind": "mine.editors:Kind", "field": "a:b"}}
            },
            "degraded": "mine.images:Own",
        },
        "model": {"text": {"tokenizer_kwargs": {"trust_remote_code": True, "x": {"trust_remote_code": False}}}},
        "run": "runs/a:b",
        "engine": "mine.engines:Own",
        "optimizer": {"kind": "mine.optimizers:Own"},
        "schedule": {"kind": "mine.schedules:Own", "warmup": "1 step"},
    }
    assert programs(recipe) == [
        ("objective", "mine.terms:Pull"),
        ("data.root", "pipe:cat"),
        ("data.sources.a.shards.1", " pipe:curl x"),
        ("data.sources.b.counterfactuals.1", "mine.editors:List"),
        ("data.counterfactuals.editors", "mine.editors:Own"),
        ("data.counterfactuals.editors.x.kind", "mine.editors:Kind"),
        ("data.degraded", "mine.images:Own"),
        ("model.text.tokenizer_kwargs.trust_remote_code", "True"),
        ("engine", "mine.engines:Own"),
        ("optimizer.kind", "mine.optimizers:Own"),
        ("schedule.kind", "mine.schedules:Own"),
    ]
    assert programs({"objective": {"clip": 1}, "evaluate": {"a": {"shards": "http://x:80/y"}}}) == []
