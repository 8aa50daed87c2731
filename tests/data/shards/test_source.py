"""A source: every sample's place and stable id, and early words about what cannot work."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.samples.captions import CaptionConfig, read_captions
from data.shards.cache import CacheConfig, ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.reader import ShardReader
from data.shards.source import Sample, Source, open_source, require_captions, sample_id, stable_names
from tests.data.small_shards import picture, sample, with_json, write_shard, write_source
from vlm.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(CacheConfig(folder=str(tmp_path / "cache")))


def opened(cache: ShardCache, *patterns: str, root: str | None = None) -> Source:
    return open_source("a", patterns, FolderIndex(cache, "data.sources.a.shards"), root=root)


def samples_of(source: Source, cache: ShardCache) -> list[Sample]:
    reader = ShardReader(cache)
    return [source.read(*source.place(number), reader) for number in range(source.num_samples)]


def test_samples_are_numbered_through_uneven_shards(tmp_path: Path, cache: ShardCache) -> None:
    source = opened(cache, write_source(tmp_path, [3, 1, 5]))
    assert source.counts.tolist() == [3, 1, 5]
    read = samples_of(source, cache)
    assert [one.key for one in read] == [f"{n:06d}" for n in range(9)]
    assert [one.image for one in read] == [picture(n) for n in range(9)]
    assert [read_captions(one.parts.get("txt"), one.fields) for one in read] == [
        (f"caption number {n}",) for n in range(9)
    ]
    with pytest.raises(IndexError):
        source.place(9)


def test_all_image_suffixes_fields_and_labels(tmp_path: Path, cache: ShardCache) -> None:
    samples = [
        sample(0, jpeg=picture(0), cls=7),
        sample(1, png=picture(1, form="PNG"), cls=8),
        sample(2, webp=picture(2, form="WEBP"), cls="9\n"),
        with_json(3, captions=["x", "y"], url="https://example.org", width=40),
    ]
    source = opened(cache, str(write_shard(tmp_path / "a.tar", samples)))
    read = samples_of(source, cache)
    assert [one.label for one in read] == [7, 8, 9, None]
    assert read[3].fields == {"captions": ["x", "y"], "url": "https://example.org", "width": 40}
    assert read[0].fields == {}
    assert read[1].image == picture(1, form="PNG")
    assert (source.labelled, source.has_labels) == (False, True)


def test_ids_survive_a_move_of_the_data_and_tell_sources_shards_and_keys_apart(
    tmp_path: Path, cache: ShardCache
) -> None:
    write_source(tmp_path / "one" / "x", [2, 2])
    shutil.copytree(tmp_path / "one" / "x", tmp_path / "one" / "y")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    ids = {
        place: [one.id for one in samples_of(opened(cache, "*/part-*.tar", root=str(tmp_path / place)), cache)]
        for place in ("one", "two")
    }
    assert ids["one"] == ids["two"]
    assert len(set(ids["one"])) == 8
    assert len({sample_id("a", "b", 1), sample_id("ab", "", 1), sample_id("a", "b1", 1), sample_id("a", "b", 2)}) == 4
    assert -(2**63) <= min(ids["one"]) <= max(ids["one"]) < 2**63


@pytest.mark.parametrize(
    ("shards", "names"),
    [
        (["/d/x-0.tar"], ["x-0.tar"]),
        (["/d/x-0.tar", "/d/x-1.tar"], ["x-0.tar", "x-1.tar"]),
        (["/d/a/x.tar", "/d/b/x.tar"], ["a/x.tar", "b/x.tar"]),
        (["s3://b/d1/x.tar", "s3://b/d2/x.tar"], ["d1/x.tar", "d2/x.tar"]),
        (["/d/x.tar", "/e/x.tar"], ["d/x.tar", "e/x.tar"]),
    ],
)
def test_stable_names_are_those_below_the_common_folder(shards: Sequence[str], names: Sequence[str]) -> None:
    assert list(stable_names(shards)) == names


def test_samples_without_an_image_are_left_out_and_told(tmp_path: Path, cache: ShardCache) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(0), sample(1, txt="alone"), sample(2)])
    for _ in range(2):  # the second time from the manifest and the kept index
        source = opened(cache, str(shard))
        assert [one.key for one in samples_of(source, cache)] == ["000000", "000002"]
        (problem,) = source.problems(cache)
        assert (problem.source, problem.key, problem.reason) == ("a", "000001", "it has no image, only txt")


def test_a_source_without_any_image_is_refused(tmp_path: Path, cache: ShardCache) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(0, txt="alone")])
    said = (
        rf"^data\.sources\.a\.shards: no image \(jpg, jpeg, png, webp\) in {shard}: 000000: it has no image, only txt$"
    )
    with pytest.raises(UserError, match=said):
        opened(cache, str(shard))


@pytest.mark.parametrize(
    ("samples", "policy", "said"),
    [
        ([sample(0, jpg=picture(0), cls=1)], {}, "expected json:captions, txt, json:caption; found no texts"),
        ([with_json(0, text="a cat", url="u")], {}, "found json:text, json:url"),
        ([with_json(0, caption="a cat")], {"fields": {"alt": 1.0}}, "expected json:alt; found json:caption"),
    ],
)
def test_a_source_without_a_caption_field_is_refused(
    tmp_path: Path,
    cache: ShardCache,
    samples: list[dict[str, bytes | str | int]],
    policy: dict[str, object],
    said: str,
) -> None:
    shard = write_shard(tmp_path / "a.tar", samples)
    with pytest.raises(UserError) as error:
        require_captions(opened(cache, str(shard)), CaptionConfig.model_validate(policy), "data.sources.a")
    assert str(error.value).startswith(f"data.sources.a: no caption field in {shard}: expected ")
    assert str(error.value).endswith(said)


def test_captions_missing_here_and_there_are_left_to_the_stream(tmp_path: Path, cache: ShardCache) -> None:
    samples = [sample(n, jpg=picture(n), json="{broken") for n in range(3)] + [with_json(3, caption="x")]
    source = opened(cache, str(write_shard(tmp_path / "a.tar", samples)))
    require_captions(source, CaptionConfig(), "data.sources.a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_shard_is_named(tmp_path: Path, cache: ShardCache) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(0)])
    shard.chmod(0)
    with pytest.raises(UserError, match=rf"{shard} cannot be read \(Permission denied\)"):
        opened(cache, str(shard))


def test_a_gzipped_shard_that_is_cut_off_is_used_as_far_as_it_goes(tmp_path: Path, cache: ShardCache) -> None:
    shard = write_shard(tmp_path / "a.tar.gz", [sample(n) for n in range(8)])
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    source = opened(cache, str(shard))
    assert 0 < source.num_samples < 8
    (problem,) = source.problems(cache)
    assert "cut off" in problem.reason
    assert problem.shard == str(shard)
