"""`vlm caption`: pictures and shards in, captions out, on any number of ranks; what cannot be read is named."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.caption import Captioned, _print, caption_pictures, generation_config
from launch.main import app
from tests.data.small_shards import picture, sample, write_shard
from tests.launch.test_captioner import MODEL, SHORT
from tests.launch.tiny import train_here, write_tiny_recipe
from tests.ranks import run_ranks
from vlm.generation.captioner import Caption

NAMES = [f"{number}.jpg" for number in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned a little, pictures beside it, and the same pictures in a shard."""
    folder = tmp_path_factory.mktemp("captions")
    pictures = [picture(number) for number in range(5)]
    for name, stored in zip(NAMES, pictures, strict=True):
        (folder / name).write_bytes(stored)
    texts = ["red", "a dog on the wet grass", "two cats", "a bus", "blue and red"]
    write_shard(folder / "train-00.tar", [sample(n, jpg=picture(n), txt=texts[n % 5]) for n in range(20)])
    write_shard(folder / "pictures.tar", [{"__key__": f"{n:03d}", "jpg": stored} for n, stored in enumerate(pictures)])
    objective = {"clip": 1.0, "caption": 2.0}
    changes = {**SHORT, "objective": objective, "duration": "40 steps", "optimizer": {"lr": 0.03}}
    train_here(write_tiny_recipe(folder, folder / "run", model=MODEL, **{**changes, "checkpoint_every": "40 steps"}))
    return folder


def said(folder: Path, method: str, patterns: list[str], batch_size: int) -> list[tuple[str, str]]:
    config = generation_config({"method": method, "max_length": 10})
    names = [str(folder / name) for name in patterns]
    return [
        (Path(one.name).stem, one.caption.text)
        for one in caption_pictures(str(folder / "run"), names, config, batch_size=batch_size)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["greedy", *(pytest.param(name, marks=pytest.mark.long) for name in ("beam", "top_p"))]
)
def test_neither_ranks_nor_batches_nor_files_change_a_caption(folder: Path, method: str) -> None:
    alone = said(folder, method, NAMES, 5)
    assert [name for name, _ in alone] == [str(number) for number in range(5)]
    assert said(folder, method, NAMES, 2) == alone
    of_shards = [("00" + name, text) for name, text in alone]
    assert said(folder, method, ["pictures.tar"], 3) == of_shards
    for rank in run_ranks(said, 2, folder, method, NAMES, 2, group=False):
        assert rank == alone
    assert run_ranks(said, 3, folder, method, ["pictures.tar"], 1, group=False)[0] == of_shards


def test_the_command_prints_a_line_each_and_writes_json(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(picture(0)[:90])
    names = [str(folder / "0.jpg"), str(tmp_path / "cut.jpg"), str(tmp_path / "none.jpg"), str(folder / "1.jpg")]
    arguments = ["caption", str(folder / "run"), *names, "--method", "beam", "--beams", "2", "--max-length", "9"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "out.jsonl")], standalone_mode=False)
    assert done.exception is None, done.output
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [names[0], names[3]]
    assert all(float(line[1]) < 0 for line in lines)
    skipped = [line for line in done.stderr.splitlines() if line.startswith("skipped: ")]
    assert [line.split(": ")[1] for line in skipped] == [names[1], names[2]]
    assert skipped[1].endswith("none.jpg: No such file or directory")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [[one["picture"], one["caption"]] for one in written] == [[line[0], line[2]] for line in lines]
    assert set(written[0]) == {"picture", "caption", "log_likelihood", "num_tokens"}


def test_a_reader_that_has_seen_enough_ends_nothing() -> None:
    """`vlm caption ... | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        _print([Captioned(0, "a.jpg", Caption("a dog", -1.5, 2))] * 10_000, gone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0.jpg", "pictures.tar"], "pictures.tar is no picture"),
        (["0.jpg", "--method", "beams"], "method: found 'beams'"),
        (["0.jpg", "--alpha", "0.5"], "alpha: found 0.5, which means nothing with method: greedy"),
        (["0.jpg", "--max-length", "99"], "max_length: found 99; the model's texts have 15 tokens at most"),
        (["none-*.tar"], "none-"),
        (["none.jpg"], "none.jpg: no picture can be read"),
        (["none.jpg", "nor.png"], "none.jpg and others: no picture can be read"),
    ],
)
def test_wrong_commands_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["caption", "run", *arguments], standalone_mode=False)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
