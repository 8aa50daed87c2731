"""`vlm data index` writes what a run reads, also into a remote store, and says what it found."""

from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from data.shards import indexing
from data.shards.cache import CacheConfig, ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.manifest import NAME, TEXTS
from launch.data_commands import data_app
from tests.data.small_shards import sample, write_shard, write_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_folder_is_indexed_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    pattern = write_source(tmp_path / "d", [3, 2])
    write_shard(tmp_path / "d" / "part-02.tar", [sample(7), sample(8, txt="alone")])
    result = CliRunner().invoke(data_app, ["index", pattern])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        *(f"part-{n:02d}.tar{end}" for n in range(3) for end in ("", ".idx")),
        TEXTS,
        NAME,
    ]
    words = " ".join(result.output.split())
    assert "3 shards" in words
    assert "samples │ 6" in words
    assert "000008: it has no image, only txt" in words


def test_shards_of_texts_alone_are_counted_not_listed(tmp_path: Path) -> None:
    write_shard(tmp_path / "texts.tar", [sample(n, txt=f"text {n}") for n in range(5)])
    write_shard(tmp_path / "mixed.tar", [sample(7), sample(8, txt="alone")])
    result = CliRunner().invoke(data_app, ["index", str(tmp_path / "*.tar")])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "samples │ 1" in words
    assert "samples of a text alone (data.images: false) │ 6" in words
    assert words.count("it has no image") == 1


def test_a_remote_folder_gets_its_index_and_a_run_reads_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path, [3, 2])
    store = fsspec.filesystem("memory")
    for number in range(2):
        store.pipe(f"/indexed/part-{number:02d}.tar", (tmp_path / f"part-{number:02d}.tar").read_bytes())
    # The memory of another process holds another store: one process indexes.
    result = CliRunner().invoke(data_app, ["index", "memory://indexed/part-{00..01}.tar", "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert sorted(path.rpartition("/")[2] for path in store.ls("/indexed", detail=False)) == [
        "part-00.tar",
        "part-00.tar.idx",
        "part-01.tar",
        "part-01.tar.idx",
        TEXTS,
        NAME,
    ]
    monkeypatch.setattr(indexing, "list_shard", None)  # nothing may open a shard any more
    elsewhere = ShardCache(CacheConfig(folder=str(tmp_path / "another node")))
    known = FolderIndex(elsewhere, "shards").load_or_build([f"memory://indexed/part-0{n}.tar" for n in range(2)])
    assert [entry.samples for entry in known.values()] == [3, 2]


def test_what_cannot_be_indexed_is_refused_in_one_line(tmp_path: Path) -> None:
    for pattern, said in (
        ("pipe:cat a.tar", "whose output has no index"),
        (str(tmp_path / "x-*.tar"), "matches no file"),
    ):
        result = CliRunner().invoke(data_app, ["index", pattern])
        assert said in str(result.exception)
