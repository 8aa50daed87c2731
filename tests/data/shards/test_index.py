"""The index of a source: every sample's place and stable id, and early words about what cannot work."""

import os
import shutil
from pathlib import Path

import pytest

from data.shards.index import index_source, require_captions, sample_id
from data.shards.tar import ShardReader
from tests.data.small_shards import picture, sample, with_json, write_shard, write_source
from vlm.errors import UserError


def test_samples_are_numbered_through_uneven_shards(tmp_path: Path) -> None:
    index = index_source("a", [write_source(tmp_path, [3, 1, 5])])
    reader = ShardReader()
    assert len(index) == 9
    assert [index[n].key for n in range(9)] == [f"{n:06d}" for n in range(9)]
    assert [index[n].image(reader) for n in range(9)] == [picture(n) for n in range(9)]
    assert [index[n].captions(reader) for n in range(9)] == [(f"caption number {n}",) for n in range(9)]
    with pytest.raises(IndexError):
        index[9]


def test_all_image_suffixes_fields_and_labels(tmp_path: Path) -> None:
    samples = [
        sample(0, jpeg=picture(0), cls=7),
        sample(1, png=picture(1, form="PNG"), cls=8),
        sample(2, webp=picture(2, form="WEBP"), cls="9\n"),
        with_json(3, captions=["x", "y"], url="https://example.org", width=40),
    ]
    index = index_source("a", [str(write_shard(tmp_path / "a.tar", samples))])
    reader = ShardReader()
    assert [index[n].label(reader) for n in range(4)] == [7, 8, 9, None]
    assert index[3].fields(reader) == {"captions": ["x", "y"], "url": "https://example.org", "width": 40}
    assert index[0].fields(reader) == {}
    assert index[1].image(reader) == picture(1, form="PNG")
    assert not index.all_have("cls")
    assert index.all_have("image")


def test_ids_survive_a_move_of_the_data_and_tell_sources_shards_and_keys_apart(tmp_path: Path) -> None:
    write_source(tmp_path / "one" / "x", [2, 2])
    shutil.copytree(tmp_path / "one" / "x", tmp_path / "one" / "y")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    ids = {
        place: [index[n].id for n in range(len(index))]
        for place in ("one", "two")
        for index in [index_source("a", ["*/part-*.tar"], root=str(tmp_path / place))]
    }
    assert ids["one"] == ids["two"]
    assert len(set(ids["one"])) == 8
    assert (
        len({sample_id("a", "b", "c"), sample_id("ab", "", "c"), sample_id("a", "bc", ""), sample_id("a", "b", "d")})
        == 4
    )
    assert -(2**63) <= min(ids["one"]) <= max(ids["one"]) < 2**63


def test_samples_without_an_image_are_left_out_and_told(tmp_path: Path) -> None:
    index = index_source("a", [str(write_shard(tmp_path / "a.tar", [sample(0), sample(1, txt="alone"), sample(2)]))])
    assert [index[n].key for n in range(len(index))] == ["000000", "000002"]
    (problem,) = index.problems
    assert (problem.source, problem.key, problem.reason) == ("a", "000001", "it has no image, only txt")


def test_a_source_without_any_image_is_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(0, txt="alone")])
    with pytest.raises(UserError, match=rf"^data\.sources\.a\.shards: no image \(jpg, jpeg, png, webp\) in {shard}$"):
        index_source("a", [str(shard)])


@pytest.mark.parametrize(
    ("samples", "found"),
    [
        ([sample(0, jpg=picture(0), cls=1)], "image, cls"),
        ([with_json(0, text="a cat", url="u")], "image, json:text, json:url"),
    ],
)
def test_a_source_without_a_caption_field_is_refused(
    tmp_path: Path, samples: list[dict[str, bytes | str | int]], found: str
) -> None:
    shard = write_shard(tmp_path / "a.tar", samples)
    with pytest.raises(UserError) as error:
        require_captions(index_source("a", [str(shard)]), ShardReader(), "data.sources.a")
    assert str(error.value).startswith(f"data.sources.a: no caption field in {shard}: expected txt, or json with")
    assert str(error.value).endswith(f"found {found}")


def test_captions_missing_here_and_there_are_left_to_the_stream(tmp_path: Path) -> None:
    samples = [sample(n, jpg=picture(n), json="{broken") for n in range(3)] + [with_json(3, caption="")]
    index = index_source("a", [str(write_shard(tmp_path / "a.tar", samples))])
    require_captions(index, ShardReader(), "data.sources.a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_shard_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(0)])
    shard.chmod(0)
    with pytest.raises(UserError, match=rf"{shard} cannot be read \(Permission denied\)"):
        index_source("a", [str(shard)])
