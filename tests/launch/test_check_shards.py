"""`vlm data check` and `vlm data filter` as a user meets them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from launch.check_shards import check
from launch.filter_shards import filter_noisy
from tests.data.check.photos import photo, stored
from tests.data.small_shards import sample, write_shard
from vlm.errors import UserError


def run(command: Callable[..., None], *words: str) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(words))


def test_check_prints_tables_writes_files_and_ends_with_1_above_the_allowed_share(tmp_path: Path) -> None:
    shard = str(write_shard(tmp_path / "a.tar", [sample(n) for n in range(9)] + [sample(9, jpg=b"", txt="x")]))
    options = ("--no-tokens", "--workers", "1", "--json", str(tmp_path / "a.json"), "--plots", str(tmp_path / "plots"))
    result = run(check, shard, *options, "--max-bad-share", "0.1")
    assert result.exit_code == 0, result.output
    assert "empty image" in result.output
    assert json.loads((tmp_path / "a.json").read_text())["bad_share"] == 0.1
    assert (tmp_path / "plots" / "caption_words.png").stat().st_size > 0
    result = run(check, shard, *options, "--max-bad-share", "0.09")
    assert result.exit_code == 1
    assert "bad samples: 10.00%, more than 9.00%" in result.output


def test_texts_alone_are_samples_where_no_images_are_read(tmp_path: Path) -> None:
    texts = [sample(n, txt=f"text {n}") for n in range(3)]
    others = [sample(3), sample(4, jpg=b"damaged", txt="of no account"), sample(5, cls=1), sample(6, txt=" ")]
    shard = str(write_shard(tmp_path / "a.tar", [*texts, *others]))
    options = ("--no-tokens", "--workers", "1", "--json", str(tmp_path / "a.json"))
    assert run(check, shard, *options).exit_code == 0
    assert json.loads((tmp_path / "a.json").read_text())["bad_samples"] == 6
    result = run(check, shard, *options, "--no-images")
    assert result.exit_code == 0, result.output
    assert "pictures" not in result.output
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["images"], report["samples"], report["bad_samples"]) == (False, 7, 2)
    assert report["distributions"]["captions_per_sample"]["count"] == 5
    assert {kind: one["listed"][0]["key"] for kind, one in report["problems"].items()} == {
        "no caption": "000005",
        "empty caption": "000006",
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--no-images", "--against", "SHARD"), "--against: compares pictures, and --no-images reads none"),
        (("--mark", ""), "--mark: "),
    ],
)
def test_what_the_check_cannot_do_is_told_before_the_work(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    shard = str(write_shard(tmp_path / "a.tar", [sample(0)]))
    result = run(check, shard, *(shard if word == "SHARD" else word for word in options))
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(words)


def test_filter_prints_what_each_rule_dropped(tmp_path: Path) -> None:
    image = stored(photo(0))
    samples = [sample(0, jpg=image, txt="a good text"), sample(1, jpg=image, txt="short")]
    shard = str(write_shard(tmp_path / "a.tar", samples))
    out = tmp_path / "out"
    result = run(filter_noisy, shard, "--out", str(out), "--min-side", "199", "--workers", "1")
    assert result.exit_code == 0, result.output
    assert "length" in result.output
    assert json.loads((out / "filter.json").read_text())["dropped"]["samples"]["first"]["length"] == 1
    assert (out / "a.tar").exists()


def test_a_wrong_limit_ends_in_one_line(tmp_path: Path) -> None:
    shard = str(write_shard(tmp_path / "a.tar", [sample(0)]))
    for option, value, named in (
        ("--without", "beauty", "without"),
        ("--image-identity", "smell", "image_identity"),
        ("--min-words", "30", "min_words"),
    ):
        result = run(filter_noisy, shard, "--out", str(tmp_path / "out"), option, value)
        assert isinstance(result.exception, UserError)
        assert named in str(result.exception)
        assert "\n" not in str(result.exception)


@pytest.mark.parametrize("command", [check, filter_noisy])
def test_a_shard_that_is_not_there_is_named(tmp_path: Path, command: Callable[..., None]) -> None:
    more = ("--out", str(tmp_path / "out")) if command is filter_noisy else ()
    result = run(command, str(tmp_path / "none.tar"), *more)
    assert isinstance(result.exception, UserError)
    assert "none.tar" in str(result.exception)
