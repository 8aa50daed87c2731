"""Shard patterns: what they find, and one clear line when they find nothing."""

import os
from pathlib import Path

import braceexpand
import pytest

from data.shards.braces import count_braces, expand_braces
from data.shards.cache import CacheConfig, ShardCache
from data.shards.folder_index import FolderIndex, folder_of
from data.shards.patterns import expand_shards
from data.shards.source import open_source
from data.shards.store import companion
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
        ("a-{00..02.tar", "'a-{00..02.tar': its braces do not close"),
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


@pytest.mark.parametrize("odd", ["run[1]", "{a,b}", "a*", "what?", "[!x]{0..1}", "sp ace", "\\back"])
def test_a_folders_own_name_is_no_pattern(tmp_path: Path, odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / odd / "data"
    for path in (folder, tmp_path / "run1" / "data", tmp_path / "a" / "data", tmp_path / "x0" / "data"):
        path.mkdir(parents=True, exist_ok=True)
        for name in ("s-0.tar", "s-1.tar"):
            (path / name).touch()
    expected = (str(folder / "s-0.tar"), str(folder / "s-1.tar"))
    for patterns, root in (
        (["s-*.tar"], str(folder)),
        (["s-{0..1}.tar"], str(folder)),
        (["s-0.tar", "s-1.tar"], str(folder)),
        (["data/s-[01].tar"], str(folder.parent)),
        ([f"{folder}/s-*.tar"], None),
        ([f"{folder}/s-{{0,1}}.tar"], "/elsewhere"),
        ([f"{folder}/s-0.tar", f"{folder}/s-1.tar"], None),
        ([f"{odd}/data/s-*.tar"], str(tmp_path)),
        ([f"file://{folder}/s-*.tar"], None),
        (["s-*.tar"], f"file://{folder}"),
    ):
        assert expand_shards(patterns, root, KEY) == expected
    monkeypatch.chdir(tmp_path)
    assert [Path(name).resolve() for name in expand_shards([f"{odd}/*/s-*.tar"], None, KEY)] == [*map(Path, expected)]


def test_a_folder_that_is_not_there_under_a_name_is_a_pattern(tmp_path: Path) -> None:
    for name in ("run1", "run2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.tar").touch()
    expected = (str(tmp_path / "run1" / "s.tar"), str(tmp_path / "run2" / "s.tar"))
    for pattern in ("run[12]/s.tar", "run{1,2}/*.tar", "r*/s.tar"):
        assert expand_shards([pattern], str(tmp_path), KEY) == expected
        assert expand_shards([str(tmp_path / pattern)], None, KEY) == expected


def test_one_shard_written_in_several_ways_counts_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ways = ["./a-00.tar", "a-00.tar", "a-0*.tar", ".//a-00.tar", "sub/../a-00.tar", str(folder / "a-00.tar")]
    assert len(expand_shards(ways, None, KEY)) == 3
    assert expand_shards(ways, None, KEY)[0] == expand_shards(["a-00.tar"], None, KEY)[0]
    (folder / "again.tar").symlink_to("a-00.tar")
    assert len(expand_shards(["a-00.tar", "again.tar"], None, KEY)) == 2  # a link is how to say twice
    (folder / "far").symlink_to(folder.parent, target_is_directory=True)
    (folder.parent / "a-00.tar").touch()  # far/../a-00.tar is neither a-00.tar here nor this one
    (folder.parent.parent / "a-00.tar").touch()
    assert len(expand_shards(["a-00.tar", "far/../a-00.tar"], None, KEY)) == 2
    (folder.parent.parent / "a-00.tar").unlink()


def test_what_an_address_says_after_its_path_is_no_pattern(folder: Path) -> None:
    import fsspec

    addresses = (
        "https://h/a.tar?download=true",
        "https://h/a.tar?X-Amz-Signature=a/b*[c]&x=y?z",
        "http://[::1]:8000/a.tar",
    )
    assert expand_shards(addresses, str(folder), KEY) == addresses
    both = ("https://h/d/a.tar?download=true", "https://h/d/b.tar?download=true")
    assert expand_shards(["{a,b}.tar?download=true"], "https://h/d", KEY) == both
    with pytest.raises(UserError, match="https cannot list files"):
        expand_shards(["https://h/*.tar?download=true"], None, KEY)
    assert folder_of("https://h/d/a.tar?sign=a/b") == "https://h/d/"
    assert companion("https://h/d/a.tar?sign=a/b", ".idx") == "https://h/d/a.tar.idx?sign=a/b"
    assert companion("s3://b/what?.tar", ".idx") == "s3://b/what?.tar.idx"
    fsspec.filesystem("memory").pipe("/odd[1]/s-0.tar", b"")
    fsspec.filesystem("memory").pipe("/odd1/s-0.tar", b"")
    assert expand_shards(["s-*.tar"], "memory://odd[1]", KEY) == ("memory://odd[1]/s-0.tar",)


@pytest.mark.parametrize(
    "pattern",
    [
        *("", "a\nb.tar", "\x1b[2J.tar", "a\x00.tar", "x" * 300, "fifo", "pipe:cat", "{" * 5000, "}{", "{a}}{"),
        *(
            "s-{000000..99999999999}.tar",
            "{0..999}{0..999}{0..999}",
            "{{0..9999}{0..9999},x}",
            "{0..1" + "0" * 5000 + "}",
        ),
    ],
)
def test_a_name_that_no_shard_has_is_one_line_at_once(folder: Path, pattern: str) -> None:
    os.mkfifo(folder / "fifo")
    root = "pipe:ls" if pattern == "pipe:cat" else str(folder)
    with pytest.raises(UserError) as error:
        expand_shards([pattern], root, KEY)
    assert str(error.value).startswith(f"{KEY}: ")
    assert str(error.value).isprintable()


def test_a_root_that_is_no_text_is_one_line() -> None:
    with pytest.raises(UserError, match=rf"^{KEY}: the root 'a.x00b' names no folder"):
        expand_shards(["*.tar"], "a\x00b", KEY)


@pytest.mark.parametrize("names", [["pipe:touch {ran}; cat a.tar"], ["pipe:touch {ran}", "pipe:tee x/y < {ran}"]])
def test_a_command_has_no_index_and_is_not_run_to_find_that_out(tmp_path: Path, names: list[str]) -> None:
    ran = tmp_path / "ran"
    cache = ShardCache(CacheConfig(folder=str(tmp_path / "cache")))
    with pytest.raises(UserError, match=rf"^{KEY}: pipe:.* is a command, .*mode: sequential"):
        open_source("web", [name.format(ran=ran) for name in names], FolderIndex(cache, KEY))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "a",
            "{a,b}",
            "{1..3}",
            "{03..1}",
            "{9..1..3}",
            "{-2..2}",
            "{a..g..2}",
            "{x}",
            "{}",
            "{,}",
            "{a,b{1..3}}{c,d}",
        ),
        *("{{1..3},{5..9..2},x}y", "\\{a,b{1,2}", "{a..}", "{1..a}", "{{a,b}}"),
    ],
)
def test_braces_are_counted_before_they_are_written_out(pattern: str) -> None:
    assert count_braces(pattern) == len(list(braceexpand.braceexpand(pattern))) == len(expand_braces(pattern))
