"""Clusters and groups: those that were planted are found, each sample is in one, stages go together; and refusals."""

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from data.embeddings.parts import open_parts
from data.neighbours.groups import NO_GROUP, group_neighbours
from data.neighbours.kmeans import fit_centres, nearest_centres
from data.neighbours.labels import NEIGHBOURS, read_labels
from launch.main import app
from tests.data.neighbours.folders import contents_of, write_embeddings, write_neighbours
from vlm.errors import UserError

Rng = np.random.Generator


def planted(
    rng: Rng, centres: int, each: int, *, dim: int = 8, spread: float = 0.01
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Unit vectors about centres that are far apart, shuffled, and the centre of each."""
    directions, _ = np.linalg.qr(rng.normal(size=(max(dim, centres), max(dim, centres))))
    owners = rng.permutation(np.repeat(np.arange(centres), each))
    vectors = directions[owners] + spread * rng.normal(size=(len(owners), directions.shape[1]))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), owners


def same_partition(one: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


@pytest.mark.parametrize(("centres", "size"), [(12, 4), (40, 3), (25, 8)])
def test_groups_that_were_planted_are_found(centres: int, size: int) -> None:
    vectors, owners = planted(np.random.default_rng(size), centres, size)
    assert same_partition(group_neighbours(vectors.astype(np.float32), size), owners)


def test_blocks_are_cut_between_groups_where_the_data_has_a_direction() -> None:
    """Centres along a line, their groups of no width: a cut anywhere but in a gap would divide one."""
    rng = np.random.default_rng(5)
    owners = rng.permutation(np.repeat(np.arange(40), 3))
    vectors = np.stack([owners + 0.01 * rng.random(120), rng.random(120), np.full(120, 30.0)], axis=1)
    found = group_neighbours(vectors.astype(np.float32), 3, block=24)
    assert same_partition(found, owners)


@pytest.mark.parametrize(
    ("samples", "size", "block"), [(101, 4, 2048), (300, 7, 32), (5, 8, 32), (0, 2, 8), (64, 2, 8)]
)
def test_each_sample_is_in_one_full_group_but_for_the_rest(samples: int, size: int, block: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(samples, 6)).astype(np.float32)
    found = group_neighbours(vectors, size, block)
    counts = np.bincount(found[found != NO_GROUP], minlength=samples // size)
    assert counts.tolist() == [size] * (samples // size)
    assert (found == NO_GROUP).sum() == samples % size


def test_neighbours_are_nearer_in_groups_than_anywhere() -> None:
    """Of vectors without any order, a group's mean cosine is above that of all pairs, and not far below the best."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(400, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    nearest = np.sort(cosines - 2 * np.eye(len(vectors)), axis=1)[:, -3:].mean()
    for block in (2048, 64):
        groups = group_neighbours(vectors.astype(np.float32), 4, block)
        same = (groups[:, None] == groups) & ~np.eye(len(groups), dtype=bool)
        assert cosines[same].mean() > 0.7 * nearest  # it may take no sample twice
        assert cosines[same].mean() > 0.5


def test_each_vector_is_in_the_cluster_of_its_nearest_centre() -> None:
    vectors = np.random.default_rng(2).normal(size=(300, 5)).astype(np.float32)
    centres = fit_centres(vectors, 7, seed=3, samples=200)
    distances = [[((a.astype(float) - b) ** 2).sum() for b in centres] for a in vectors]
    np.testing.assert_array_equal(nearest_centres(vectors, centres), np.argmin(distances, axis=1))
    np.testing.assert_array_equal(fit_centres(vectors, 7, seed=3, samples=200), centres)


def command(*words: str) -> BaseException | None:
    return CliRunner().invoke(app, ["data", "cluster", *words], standalone_mode=False).exception


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, NDArray[np.int64]]:
    """Embeddings of 3 shards about 4 centres, two samples without any; the centre of each of the others in order."""
    vectors, owners = planted(np.random.default_rng(4), 4, 15)
    counts = [30, 0, 30]
    shares = np.split(vectors, np.cumsum(counts)[:-1])
    rows = {2: [row for row in range(30) if row not in (3, 20)]}
    (tmp_path / "in").mkdir()
    write_embeddings(tmp_path / "in", contents_of(counts), shares, rows)
    return tmp_path, np.delete(owners, [33, 50])


def labels_in(folder: Path, *, groups: bool) -> list[NDArray[np.int64]]:
    parts = open_parts(folder, NEIGHBOURS, "labels")
    found = [read_labels(parts, record, groups=groups) for record in parts.manifest.parts]
    columns = [found_one[int(groups)] for found_one in found]
    assert [len(column) for column in columns if column is not None] == [30, 0, 30]
    return [column.astype(np.int64) for column in columns if column is not None]


def test_the_folder_has_clusters_over_stages_and_groups_within_them(folder: tuple[Path, NDArray[np.int64]]) -> None:
    path, owners = folder
    assert command(str(path / "in"), "--out", str(path / "one"), "--clusters", "4", "--groups", "4") is None
    clusters = np.concatenate(labels_in(path / "one", groups=False))
    assert clusters[[33, 50]].tolist() == [-1, -1]
    known = np.delete(clusters, [33, 50])
    assert same_partition(known, owners)
    groups = np.delete(np.concatenate(labels_in(path / "one", groups=True)), [33, 50])
    counts = np.bincount(groups)
    assert counts.tolist() == [4] * 14 + [2]
    whole = [
        len(set(known[groups == group].tolist())) == 1 for group in range(12)
    ]  # of each cluster 13 to 15: 3 groups
    assert all(whole)
    words = [str(path / "in"), "--clusters", "3", "--stages", str(path / "one")]
    assert command(*words, "--out", str(path / "two")) is None
    second = np.delete(np.concatenate(labels_in(path / "two", groups=False)), [33, 50])
    np.testing.assert_array_equal(second // 3, known)
    assert set((second % 3).tolist()) <= {0, 1, 2}
    manifest = open_parts(path / "two", NEIGHBOURS, "labels").manifest
    assert (manifest.stages, manifest.num_clusters, manifest.clusters) == (2, 12, 3)
    assert command(*words, "--out", str(path / "again")) is None
    for file in (path / "two").iterdir():
        assert file.read_bytes() == (path / "again" / file.name).read_bytes()


def test_what_has_no_label_of_the_stage_before_has_none_after_it(folder: tuple[Path, NDArray[np.int64]]) -> None:
    path, _ = folder
    (path / "before").mkdir()
    before = [np.zeros(30, np.int64), np.zeros(0, np.int64), np.zeros(30, np.int64)]
    before[0][5] = -1
    write_neighbours(path / "before", contents_of([30, 0, 30]), before)
    words = [str(path / "in"), "--clusters", "2", "--out", str(path / "out"), "--stages", str(path / "before")]
    assert command(*words) is None
    after = labels_in(path / "out", groups=False)
    assert np.flatnonzero(after[0] < 0).tolist() == [5]
    assert np.flatnonzero(after[2] < 0).tolist() == [3, 20]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clusters", "59"], "--clusters: 59 are more than there are samples: .*in has 58"),
        (["--clusters", "2", "--on", "text"], "--on: .*in has embeddings of image alone, none of text"),
        (["--clusters", "2", "--on", "texts"], "--on: unknown 'texts'; nearest: text"),
        (["--clusters", "2", "--stages", "other"], "--stages: other was made of other samples or texts than 0.tar"),
        (["--clusters", "2", "--stages", "in"], "--stages: in has no neighbours.json"),
        (["--clusters", "2", "--out", "in"], "--out: in is not empty"),
    ],
)
def test_wrong_commands_are_one_line(
    folder: tuple[Path, NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    path, _ = folder
    monkeypatch.chdir(path)
    Path("other").mkdir()
    write_neighbours(Path("other"), contents_of([29, 0, 30]), [np.zeros(n, np.int64) for n in (29, 0, 30)])
    out = [] if "--out" in words else ["--out", "new"]
    error = command("in", *words, *out)
    assert isinstance(error, UserError), error
    assert re.search(message, str(error)), error
    assert "\n" not in str(error)
    assert not Path("new").exists()
