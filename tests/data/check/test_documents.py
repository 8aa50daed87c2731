"""Shards of documents in the index and the check: every image of a document, and what does not go together."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.check.report import CheckConfig, check_shards
from data.check.samples import OpenShard
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.indexing import Indexer
from data.shards.sidecar import make_index, parse_index, to_bytes
from data.shards.stamp import Stamp
from data.shards.statistics import ShardStatistics
from data.shards.tar import Extent, list_shard
from tests.data.check.photos import photo, stored
from tests.data.documents import document, num_images, plain_picture
from tests.data.small_shards import sample, write_shard

PLAIN = CheckConfig(clip_tokens=False)


def with_photos(number: int) -> dict[str, bytes | str | int]:
    """A document whose images can be told apart."""
    one = document(number)
    return {**one, **{f"{place}.png": stored(photo(100 * number + place)) for place in range(num_images(number))}}


def test_the_check_reads_every_image_of_a_document(tmp_path: Path) -> None:
    good = [with_photos(number) for number in range(3)]
    again = {**with_photos(4), "__key__": "again", "1.png": good[2]["1.png"]}  # an image of another document
    bad = [
        {**document(5), "__key__": "cut", "0.png": plain_picture(5, 0)[:30]},
        {**document(5), "__key__": "empty", "1.png": b""},
        {**document(5, images=["0.png", "1.png", "7.png"]), "__key__": "missing"},
        {**document(5, text="a <image>"), "__key__": "places"},
    ]
    shard = write_shard(tmp_path / "docs.tar", [*good, again, *bad])
    test_set = write_shard(tmp_path / "test.tar", [sample(0, jpg=stored(photo(201)), txt="x")])
    report, _ = check_shards([str(shard)], PLAIN, against=[str(test_set)], workers=1)
    pictures = sum(map(num_images, (0, 1, 2, 4))) + 4 * num_images(5)
    assert (report.samples, report.bad_samples) == (8, 4)
    assert report.suffixes == {"png": pictures, "json": 8}
    assert report.distributions["images_per_document"].count == 8
    assert report.distributions["image_width_px"].count == pictures - 2
    assert {kind: problems.count for kind, problems in report.problems.items()} == {
        "unreadable document": 2,
        "undecodable image": 1,
        "empty image": 1,
    }
    named = {one.key: one.reason for one in report.problems["unreadable document"].listed}
    assert named == {
        "missing": "its json names an image '7.png', which is not among its members",
        "places": "its text has 1 places of images, and its json names 3 images",
    }
    (group,) = report.duplicates.equal_pictures.listed
    assert {one.key for one in group} == {"doc0002", "again"}
    assert report.duplicates.keys.groups == 0
    assert report.duplicates.against is not None
    found = {match.sample.key for match in report.duplicates.against.listed}
    assert found == {"doc0002", "again"}


def test_a_mark_of_ones_own_is_looked_for(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "docs.tar", [document(0, text="a [IMG] dog")])
    assert check_shards([str(shard)], PLAIN, workers=1)[0].bad_samples == 1
    own = CheckConfig(clip_tokens=False, mark="[IMG]")
    assert check_shards([str(shard)], own, workers=1)[0].bad_samples == 0


def test_the_index_holds_every_image_and_that_of_pairs_is_as_before(tmp_path: Path) -> None:
    documents = write_shard(tmp_path / "docs.tar", [document(number) for number in range(4)])
    pairs = write_shard(tmp_path / "pairs.tar", [sample(number) for number in range(3)])
    index = Indexer(ShardCache(), "x")(str(documents))
    again = parse_index(to_bytes(index), "x")
    assert again is not None
    content = documents.read_bytes()
    for row in range(4):
        extents = again.extents(row)
        assert extents == index.extents(row)
        images = {name: extent for name, extent in extents.items() if name != "json"}
        assert list(images) == [f"{place}.png" for place in range(num_images(row))]
        for place, (offset, size) in enumerate(images.values()):
            assert content[offset : offset + size] == plain_picture(row, place)
    source = FolderIndex(ShardCache(), "x").statistics([str(documents)])
    assert (source.documents, source.document_images) == (4, sum(map(num_images, range(4))))
    plain = to_bytes(make_index(list_shard(pairs, "x", "x"), Stamp(1, "1")))
    assert b"image_ends" not in plain


def test_a_right_checksum_does_not_make_impossible_places_possible(tmp_path: Path) -> None:
    documents = write_shard(tmp_path / "docs.tar", [document(number) for number in range(4)])
    index = Indexer(ShardCache(), "x")(str(documents))
    assert index.images is not None
    for name, place, value in (
        ("image_ends", -1, -5),
        ("image_offsets", 0, -5),
        ("image_name_ends", -1, -5),
        ("image_names", 0, 0xFF),  # in no text
    ):
        changed = getattr(index.images, name).copy()
        changed[place] = value
        broken = replace(index, images=replace(index.images, **{name: changed}))
        assert parse_index(to_bytes(broken), "x") is None
    keys = index.keys.copy()
    keys[0] = 0xFF
    assert parse_index(to_bytes(replace(index, keys=keys)), "x") is None
    imageless = ShardStatistics(samples=5)  # of 4 samples in all
    header = index.header.model_copy(update={"imageless": imageless})
    assert parse_index(to_bytes(replace(index, header=header)), "x") is None


def test_names_are_whole_characters(tmp_path: Path) -> None:
    keys = ("\u00e9", "\ud800", "\U0001f436.")
    shard = write_shard(tmp_path / "docs.tar", [{**document(0), "__key__": key} for key in ("aa", "bbb", "ccccc")])
    index = Indexer(ShardCache(), "x")(str(shard))
    stored = np.frombuffer("".join(keys).encode("utf-8", "surrogatepass"), dtype=np.uint8)
    odd = parse_index(to_bytes(replace(index, keys=stored)), "x")
    assert odd is not None
    assert tuple(map(odd.key, range(3))) == keys
    within = replace(index, keys=stored, key_ends=np.asarray([1, 5, 10], dtype=np.int64))
    assert parse_index(to_bytes(within), "x") is None


class Counted(dict[str, Extent]):
    """Members that count how often they are gone through."""

    looks = 0

    def __iter__(self) -> Iterator[str]:
        self.looks += 1
        return super().__iter__()


def test_a_document_of_many_images_is_looked_through_once(tmp_path: Path) -> None:
    names = [f"{place}.png" for place in range(50)]
    stored = json.dumps({"images": names, "texts": ["a", *[None] * 50]})
    shard = write_shard(tmp_path / "docs.tar", [{"__key__": "a", "json": stored, **dict.fromkeys(names, b"")}])
    with OpenShard(str(shard)) as opened:
        (one,) = opened
        counted = Counted(one.members)
        assert replace(one, members=counted).document_text("<image>") == "a"
    assert counted.looks < 10
