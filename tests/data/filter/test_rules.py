"""Each rule drops what lies beyond its limit and nothing at the limit; the limits are the paper's."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from data.filter.rules import AlignRules
from data.filter.run import KEPT_LIST, FilterJob, FilterReport, filter_shards
from data.filter.words import grams, normal_form
from tests.data.check.photos import photo, stored
from tests.data.filter.by_webdataset import read_by_webdataset
from tests.data.small_shards import SAMPLE, sample, write_shard
from vlm.errors import UserError

OPEN = AlignRules(min_side=0, min_words=0, max_words=10_000)
"""No rule that a small test picture or text breaks by itself."""


def plain(width: int, height: int, grey: int = 128) -> bytes:
    return stored(Image.new("L", (width, height), grey), "PNG")


def pair(number: int, text: str, image: bytes | None = None) -> SAMPLE:
    """A sample whose image no other one shows, unless it is given."""
    return sample(number, png=image or stored(photo(number, (40, 40)), "PNG"), txt=text)


def run(folder: Path, samples: list[SAMPLE], rules: AlignRules, exclude: tuple[str, ...] = ()) -> FilterReport:
    shard = write_shard(folder / "in" / "a.tar", samples)
    return filter_shards(FilterJob((str(shard),), rules, folder / "out", exclude), workers=1)


def kept(folder: Path) -> list[str]:
    return pl.read_parquet(folder / "out" / KEPT_LIST)["key"].to_list()


def test_the_limits_are_the_papers() -> None:
    rules = AlignRules()
    assert (rules.min_side, rules.max_aspect_ratio, rules.max_texts_per_image) == (200, 3.0, 1000)
    assert (rules.max_images_per_text, rules.max_ngrams, rules.min_words, rules.max_words) == (10, 100_000_000, 3, 20)


def test_the_shorter_side_exceeds_200_pixels(tmp_path: Path) -> None:
    sizes = [(199, 300), (200, 300), (201, 300), (300, 200), (300, 201)]
    report = run(
        tmp_path,
        [pair(n, f"a text {n}", plain(*size)) for n, size in enumerate(sizes)],
        AlignRules(),
    )
    assert kept(tmp_path) == ["000002", "000004"]
    assert report.dropped["samples"].first["min_side"] == report.dropped["samples"].alone["min_side"] == 3


def test_the_aspect_ratio_is_below_3_either_way(tmp_path: Path) -> None:
    sizes = [(897, 300), (900, 300), (300, 897), (300, 900), (901, 300)]  # 2.99, 3.00, and a little more
    report = run(
        tmp_path,
        [pair(n, f"a text {n}", plain(*size)) for n, size in enumerate(sizes)],
        AlignRules(),
    )
    assert kept(tmp_path) == ["000000", "000002"]
    assert report.dropped["samples"].first["aspect_ratio"] == 3


def test_texts_have_3_to_20_words(tmp_path: Path) -> None:
    lengths = [2, 3, 20, 21]
    texts = [" ".join(f"w{n}" for n in range(length)) + " ." for length in lengths]
    run(tmp_path, [pair(n, text) for n, text in enumerate(texts)], AlignRules(min_side=0))
    assert kept(tmp_path) == ["000001", "000002"]


def test_a_text_of_more_than_10_images_is_dropped(tmp_path: Path) -> None:
    often = [pair(n, "IMG  0001!") for n in range(10)] + [pair(10, " img 0001")]
    just = [pair(n, "ten times") for n in range(20, 30)]
    same_image = [pair(n, "one image", plain(40, 40)) for n in range(40, 60)]
    report = run(tmp_path, [*often, *just, *same_image], OPEN)
    assert kept(tmp_path) == [f"{n:06d}" for n in (*range(20, 30), *range(40, 60))]
    assert report.dropped["samples"].first["images_per_text"] == 11


@pytest.mark.parametrize(("limit", "rules"), [(5, OPEN.model_copy(update={"max_texts_per_image": 5})), (1000, OPEN)])
def test_an_image_with_more_texts_than_the_limit_is_dropped(tmp_path: Path, limit: int, rules: AlignRules) -> None:
    def texts(number: int, count: int) -> SAMPLE:
        captions = [f"text {number} {n}" for n in range(count)] * 2  # each twice: different ones count
        return sample(number, png=plain(30, 30, grey=number), json=json.dumps({"captions": captions}))

    report = run(tmp_path, [texts(1, limit), texts(2, limit + 1)], rules)
    assert kept(tmp_path) == ["000001"]
    assert report.dropped["captions"].first["texts_per_image"] == 2 * (limit + 1)


@pytest.mark.parametrize(
    ("identity", "dropped"), [("bytes", []), ("url", ["000000", "000001", "000003"]), ("picture", [*range(3)])]
)
def test_what_makes_two_images_one_can_be_chosen(tmp_path: Path, identity: str, dropped: list[object]) -> None:
    image = photo(0)
    files = [stored(image, "PNG"), stored(image, "PNG", compress_level=1), stored(image, "WEBP", lossless=True)]
    suffixes, urls = ("png", "png", "webp", "png"), ("u", "u", "v", "u")
    samples: list[SAMPLE] = [
        {"__key__": f"{n:06d}", suffix: file, "json": json.dumps({"caption": f"text {n}", "url": url})}
        for n, (suffix, file, url) in enumerate(zip(suffixes, [*files, stored(photo(9), "PNG")], urls, strict=True))
    ]
    run(tmp_path, samples, OPEN.model_copy(update={"max_texts_per_image": 1, "image_identity": identity}))
    expected = {one if isinstance(one, str) else f"{one:06d}" for one in dropped}
    assert kept(tmp_path) == [key for key in (f"{n:06d}" for n in range(4)) if key not in expected]


def test_rare_unigrams_and_bigrams_by_a_hand_count(tmp_path: Path) -> None:
    texts = ["Red car", "red car.", "red, car", "blue car", "dog", "dog", "car red"]

    def left(name: str, **limits: int) -> list[int]:
        rules = OPEN.model_copy(update=limits)
        run(tmp_path / name, [pair(n, text) for n, text in enumerate(texts)], rules)
        return [int(key) for key in kept(tmp_path / name)]

    # red 4, car 5, red car 3, dog 2, blue 1, blue car 1, car red 1
    assert left("all") == [0, 1, 2, 3, 4, 5, 6]
    assert left("seven", max_ngrams=7) == [0, 1, 2, 3, 4, 5, 6]
    assert left("five", max_ngrams=5) == [0, 1, 2, 3, 4, 5, 6]  # the fifth is as rare as the sixth and the seventh
    assert left("four", max_ngrams=4) == [0, 1, 2, 4, 5]
    assert left("three", max_ngrams=3) == [0, 1, 2]
    assert left("two", max_ngrams=2) == []
    assert left("twice", min_ngram_count=2) == [0, 1, 2, 4, 5]
    assert left("thrice", min_ngram_count=3) == [0, 1, 2]


def test_words_are_case_folded_and_stripped_of_punctuation() -> None:
    assert normal_form("  A dog's  “Life”, 1920x1080 (new) -- \ud800 Straße !") == "a dog's life 1920x1080 new strasse"
    assert grams("a b c") == ["a", "b", "c", "a b", "b c"]
    assert grams("") == []


def test_reencoded_test_pictures_are_dropped_and_others_kept(tmp_path: Path) -> None:
    tests = write_shard(
        tmp_path / "test.tar",
        [sample(n, jpg=stored(photo(n), quality=95), txt="x") for n in range(5)] + [sample(9, png=plain(60, 50))],
    )
    copies = [
        pair(0, "a", stored(photo(0).resize((150, 100)), "PNG")),
        sample(1, jpg=stored(photo(1), quality=50), txt="b"),
        pair(9, "the same plain file", plain(60, 50)),
    ]
    others = [pair(n, f"text {n}", stored(photo(n), "PNG")) for n in range(10, 30)]
    others.append(pair(31, "another plain file", plain(50, 50)))
    report = run(tmp_path, [*copies, *others], OPEN, exclude=(str(tests),))
    assert kept(tmp_path) == [one["__key__"] for one in others]
    assert report.dropped["samples"].first["test_duplicate"] == 3
    assert report.excluded_pictures == 6


def test_what_cannot_be_used_is_dropped_first(tmp_path: Path) -> None:
    samples = [
        pair(0, "fine"),
        pair(1, ""),
        pair(2, "x", b"junk"),
        sample(3, txt="no image"),
        sample(4, png=plain(9, 9)),
    ]
    shard = write_shard(tmp_path / "in" / "a.tar", samples)
    with tarfile.open(shard, "a") as tar:
        tar.addfile(tarfile.TarInfo("../up.jpg"), io.BytesIO())
    report = filter_shards(FilterJob((str(shard),), OPEN, tmp_path / "out"), workers=1)
    assert kept(tmp_path) == ["000000"]
    assert report.dropped["samples"].first["unusable"] == 5
    assert (report.dropped["samples"].total, report.dropped["captions"].total) == (6, 1)


def test_first_and_alone_of_several_captions_by_a_hand_count(tmp_path: Path) -> None:
    def several(number: int, size: int, *captions: str) -> SAMPLE:
        return sample(number, png=plain(size, size, grey=number), json=json.dumps({"captions": captions}))

    samples = [
        several(1, 300, "one", "", "a b c", "d e f g"),  # loses its first caption
        several(2, 300, "one", "two"),  # loses both: length
        several(3, 100, "one", "a long text"),  # too small; its first caption is too short as well
        several(4, 100, "g h i"),  # too small
    ]
    report = run(tmp_path, samples, AlignRules(max_words=4))
    first, alone = report.dropped["samples"].first, report.dropped["samples"].alone
    assert {rule: count for rule, count in first.items() if count} == {"min_side": 2, "length": 1}
    assert {rule: count for rule, count in alone.items() if count} == {"min_side": 2, "length": 1}
    first, alone = report.dropped["captions"].first, report.dropped["captions"].alone
    assert {rule: count for rule, count in first.items() if count} == {"min_side": 3, "length": 3}
    assert {rule: count for rule, count in alone.items() if count} == {"min_side": 3, "length": 4}
    assert (report.dropped["captions"].kept, report.dropped["captions"].total) == (2, 8)
    (only,) = read_by_webdataset(tmp_path / "out" / "a.tar")
    assert json.loads(only["json"]) == {"captions": ["a b c", "d e f g"]}
    assert only["png"] == samples[0]["png"]


def test_a_rule_can_be_left_out(tmp_path: Path) -> None:
    rules = AlignRules(without=("min_side", "length"))
    report = run(tmp_path, [pair(0, "short", plain(50, 50)), pair(1, "thin one", plain(50, 10))], rules)
    assert kept(tmp_path) == ["000000"]
    assert report.dropped["samples"].alone["min_side"] == 0


@pytest.mark.parametrize(
    "wrong", [{"min_words": 5, "max_words": 4}, {"without": ("unusable",)}, {"max_aspect_ratio": 1}]
)
def test_impossible_rules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"min_words|unusable|max_aspect_ratio"):
        AlignRules(**wrong)


def test_a_shard_that_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(np.arange(2000, dtype=np.uint8).tobytes())
    with pytest.raises(UserError, match=r"x\.tar is no tar"):
        filter_shards(FilterJob((str(tmp_path / "x.tar"),), OPEN, tmp_path / "out"), workers=1)
