"""Shard patterns: what they find, and one clear line when they find nothing."""

from pathlib import Path

import pytest

from data.shards.patterns import expand_shards
from vlm.errors import UserError

KEY = "data.sources.web.shards"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ["a-00.tar", "a-01.tar", "a-02.tar", "b-0.tar.gz", "sub/c.tar"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["a-00.tar"], ["a-00.tar"]),
        (["a-{00..02}.tar"], ["a-00.tar", "a-01.tar", "a-02.tar"]),
        (["a-{02,00}.tar"], ["a-02.tar", "a-00.tar"]),
        (["a-*.tar"], ["a-00.tar", "a-01.tar", "a-02.tar"]),
        (["{a,b}-*"], ["a-00.tar", "a-01.tar", "a-02.tar", "b-0.tar.gz"]),
        (["**/c.tar"], ["sub/c.tar"]),
        (["a-02.tar", "a-*.tar"], ["a-02.tar", "a-00.tar", "a-01.tar"]),
    ],
)
def test_patterns_below_a_root(folder: Path, patterns: list[str], names: list[str]) -> None:
    assert expand_shards(patterns, str(folder), KEY) == tuple(folder / name for name in names)


def test_absolute_patterns_ignore_the_root_and_relative_ones_need_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert expand_shards([str(folder / "a-00.tar")], "/elsewhere", KEY) == (folder / "a-00.tar",)
    monkeypatch.chdir(folder)
    assert [path.resolve() for path in expand_shards(["a-00.tar"], None, KEY)] == [folder / "a-00.tar"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("x-*.tar", "x-*.tar matches no file"),
        ("a-{00..03}.tar", "there is no file {folder}/a-03.tar (nearest: a-0"),
        ("nowhere/a.tar", "there is no folder {folder}/nowhere"),
        ("sub", "{folder}/sub is a folder; name its shards, as in {folder}/sub/*.tar"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar: shards are read from local files"),
        ("pipe:cat a.tar", "shards are read from local files"),
        ("a-{00..02.tar", "a-{00..02.tar: "),
    ],
)
def test_a_pattern_that_finds_nothing_is_named_in_one_line(folder: Path, pattern: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        expand_shards([pattern], str(folder), KEY)
    assert str(error.value).startswith(KEY + ": ")
    assert said.replace("{folder}", str(folder)) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_patterns_at_all_are_refused() -> None:
    with pytest.raises(UserError, match="no shards are named"):
        expand_shards([], None, KEY)
