"""Shard patterns: what they find, and one clear line when they find nothing."""

from pathlib import Path

import pytest

from data.shards.patterns import expand_shards
from vlm.errors import UserError

KEY = "data.sources.web.shards"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ["a-00.tar", "a-01.tar", "a-02.tar", "a-00.tar.idx", "vlm-index.json.gz", "b-0.tar.gz", "sub/c.tar"]:
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
        (["*-[0i]*"], ["a-00.tar", "a-01.tar", "a-02.tar", "b-0.tar.gz"]),
        (["**/c.tar"], ["sub/c.tar"]),
        (["a-02.tar", "a-*.tar"], ["a-02.tar", "a-00.tar", "a-01.tar"]),
    ],
)
def test_patterns_below_a_root(folder: Path, patterns: list[str], names: list[str]) -> None:
    assert expand_shards(patterns, str(folder), KEY) == tuple(str(folder / name) for name in names)


def test_absolute_patterns_ignore_the_root_and_relative_ones_need_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert expand_shards([str(folder / "a-00.tar")], "/elsewhere", KEY) == (str(folder / "a-00.tar"),)
    monkeypatch.chdir(folder)
    assert [Path(name).resolve() for name in expand_shards(["a-00.tar"], None, KEY)] == [folder / "a-00.tar"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("x-*.tar", "x-*.tar matches no file"),
        ("a-{00..03}.tar", "there is no file {folder}/a-03.tar (nearest: a-0"),
        ("nowhere/a.tar", "there is no folder {folder}/nowhere"),
        ("sub", "{folder}/sub is a folder; name its shards, as in {folder}/sub/*.tar"),
        ("https://127.0.0.1/x-*.tar", "https"),
        ("s4://bucket/a.tar", "unknown scheme s4://; nearest: s3"),
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


def test_urls_are_taken_at_their_word_and_stars_ask_the_store(folder: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("x-1.tar", "x-0.tar", "x-0.tar.idx", "y.tar"):
        store.pipe(f"/patterns/{name}", b"")
    assert expand_shards(["https://b/{0..1}.tar"], str(folder), KEY) == ("https://b/0.tar", "https://b/1.tar")
    assert expand_shards(["{0..1}.tar"], "https://b/d/", KEY) == ("https://b/d/0.tar", "https://b/d/1.tar")
    assert expand_shards(["pipe:cat {a,b} *.tar"], str(folder), KEY) == ("pipe:cat {a,b} *.tar",)
    found = expand_shards(["x-*"], "memory://patterns", KEY)
    assert [name.rpartition("/")[2] for name in found] == ["x-0.tar", "x-1.tar"]
    assert all(name.startswith("memory://") for name in found)
    with pytest.raises(UserError, match=rf"^{KEY}: .*matches nothing"):
        expand_shards(["z-*.tar"], "memory://patterns", KEY)
