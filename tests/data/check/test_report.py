"""The check finds what was planted, and its figures are those of a count by hand."""

import io
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.check.histogram import QUANTILES, Histogram
from data.check.plots import draw_plots
from data.check.report import CheckConfig, check_shards
from data.check.samples import OpenShard
from data.check.scan import ScanJob, scan_shard
from tests.data.check.photos import photo, stored
from tests.data.small_shards import picture, sample, with_json, write_shard
from vlm.model.tokenizer import clip_token_counts

PLAIN = CheckConfig(clip_tokens=False)


def reencoded(image: bytes) -> bytes:
    return stored(Image.open(io.BytesIO(image)), quality=50)


def planted(folder: Path) -> list[str]:
    """Shards with one defect of each kind, and two of some."""
    good = [sample(number) for number in range(6)]
    bad = [
        sample(10, txt="no picture"),
        sample(11, jpg=b"", txt="empty picture"),
        sample(12, jpg=picture(12)[:400], txt="cut picture"),
        sample(13, jpg=b"garbage", txt="no picture either"),
        sample(14, jpg=picture(14)),
        sample(15, jpg=picture(15), txt="  "),
        sample(16, jpg=picture(16), txt=b"\xff\xfe broken"),
        sample(17, jpg=picture(17), json=b"{broken"),
        sample(18, jpg=picture(18), cls=3),
        sample(19, jpg=picture(19)[:400], txt=b"\xff"),
    ]
    first = write_shard(folder / "a.tar", [*good, *bad])
    with tarfile.open(first, "a") as tar:
        for name in ("/etc/evil.jpg", "../up.txt", "000000.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
    second = write_shard(
        folder / "b.tar.gz",
        [
            sample(0, jpg=picture(50), txt="a key that a.tar has"),
            sample(20, jpg=picture(1), txt="the same file"),
            sample(21, jpg=reencoded(picture(2, (200, 160))), png=picture(3), txt="one"),
            with_json(22, captions=["one two", "three"]),
        ],
    )
    third = write_shard(folder / "c.tar", [sample(number) for number in range(30, 34)])
    third.write_bytes(third.read_bytes()[:-11_000])
    fourth = folder / "d.tar"
    fourth.write_bytes(b"no tar" * 500)
    return [str(path) for path in (first, second, third, fourth)]


def test_every_planted_defect_is_found_and_counted_once(tmp_path: Path) -> None:
    shards = planted(tmp_path)
    report, _ = check_shards(shards, PLAIN, workers=1)
    assert {kind: found.count for kind, found in report.problems.items()} == {
        "undecodable image": 3,
        "unreadable caption": 2,
        "unsafe member": 2,
        "no image": 1,
        "empty image": 1,
        "no caption": 1,
        "empty caption": 1,
        "unreadable json": 1,
        "repeated member": 1,
        "damaged shard": 1,
        "unreadable shard": 1,
    }
    with OpenShard(shards[2]) as cut:
        left = len(cut)
    assert 0 < left < 4
    assert report.samples == 16 + 4 + left
    assert report.bad_samples == 9 + 2 + 1 + 1  # ten bad samples but the one with a class; members; two shards
    assert report.entries == report.samples + 2 + 1 + 1
    assert report.bad_share == report.bad_samples / report.entries
    examples = {(Path(one.shard).name, one.key) for one in report.problems["undecodable image"].listed}
    assert examples == {("a.tar", "000012"), ("a.tar", "000013"), ("a.tar", "000019")}
    assert "d.tar" in report.problems["unreadable shard"].listed[0].reason


def test_duplicates_of_files_pictures_and_keys_are_named(tmp_path: Path) -> None:
    big = stored(photo(2), quality=95)
    shards = [
        write_shard(tmp_path / "a.tar", [sample(0), sample(1), sample(2, jpg=big, txt="x")]),
        write_shard(
            tmp_path / "b.tar",
            [sample(1, jpg=picture(9), txt="x"), sample(3, jpg=reencoded(big), txt="x"), sample(4, jpg=big, txt="x")],
        ),
    ]
    tests = write_shard(
        tmp_path / "test.tar", [sample(0, jpg=picture(77), txt="x"), sample(7, jpg=reencoded(big), txt="x")]
    )
    report, _ = check_shards(list(map(str, shards)), PLAIN, against=[str(tests)], workers=1)
    found = report.duplicates
    names = [[(Path(one.shard).name, one.key) for one in group] for group in found.near_pictures.listed]
    assert names == [[("a.tar", "000002"), ("b.tar", "000003"), ("b.tar", "000004")]]
    assert (found.files.groups, found.files.samples) == (1, 2)
    assert [place.key for place in found.files.listed[0]] == ["000002", "000004"]
    assert [[place.key for place in group] for group in found.keys.listed] == [["000001", "000001"]]
    assert found.against is not None
    assert found.against.samples == 3
    assert {(match.sample.key, match.other.key) for match in found.against.listed} == {
        ("000002", "000007"),
        ("000003", "000007"),
        ("000004", "000007"),
    }


def test_the_json_is_a_count_by_hand(tmp_path: Path) -> None:
    sizes = [(40, 32), (64, 20), (20, 64), (300, 200), (33, 33)]
    captions = [["a b"], ["one two three", "vier"], ["x"], ["é ü"], ["last one here"]]
    samples = [
        sample(n, jpg=picture(n, size), json=json.dumps({"captions": texts}))
        for n, (size, texts) in enumerate(zip(sizes, captions, strict=True))
    ]
    samples.append(sample(9, png=picture(9, (50, 10), "PNG"), txt="a png"))
    shards = [str(write_shard(tmp_path / f"{n}.tar", samples[n::3])) for n in range(3)]
    report, histograms = check_shards(shards, CheckConfig(), workers=1)
    report.write(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["shards"], found["samples"], found["bad_samples"]) == (3, 6, 0)
    assert found["bytes"] == sum(Path(shard).stat().st_size for shard in shards)
    assert found["suffixes"] == {"jpg": 5, "json": 5, "png": 1, "txt": 1}
    assert found["formats"] == {"JPEG": 5, "PNG": 1}
    texts = [text for several in captions for text in several] + ["a png"]
    files = [one.get("jpg") or one["png"] for one in samples]
    by_hand = {
        "image_width_px": [width for width, _ in sizes] + [50],
        "image_height_px": [height for _, height in sizes] + [10],
        "image_aspect": [round(width / height, 3) for width, height in sizes] + [5.0],
        "image_bytes": [len(file) for file in files if isinstance(file, bytes)],
        "captions_per_sample": [len(several) for several in captions] + [1],
        "caption_characters": list(map(len, texts)),
        "caption_words": [len(text.split()) for text in texts],
        "caption_clip_tokens": clip_token_counts(texts).tolist(),
    }
    assert found["distributions"].keys() == by_hand.keys()
    for name, values in by_hand.items():
        one = found["distributions"][name]
        assert (one["count"], one["min"], one["max"]) == (len(values), min(values), max(values))
        assert np.isclose(one["mean"], np.mean(values))
        assert one["quantiles"] == {f"{q:g}": np.quantile(values, q, method="inverted_cdf") for q in QUANTILES}
    drawn = draw_plots(histograms, tmp_path / "plots")
    assert len(drawn) == 7
    for path in drawn:
        with Image.open(path) as plot:
            assert plot.width > 300


def test_a_scan_travels_between_processes_whole(tmp_path: Path) -> None:
    for shard in planted(tmp_path):
        job = ScanJob(shard)
        scan = scan_shard(job)
        other = pickle.loads(pickle.dumps(scan))  # noqa: S301
        assert pickle.loads(pickle.dumps(job)) == job  # noqa: S301
        for name, value in vars(scan).items():
            arrived = getattr(other, name)
            if name == "histograms":
                value = {key: one.describe() for key, one in value.items()}
                arrived = {key: one.describe() for key, one in arrived.items()}
            assert np.array_equal(arrived, value)


@given(st.lists(st.lists(st.integers(-50, 50), max_size=30), max_size=5))
def test_histograms_that_are_added_up_are_the_histogram_of_all(parts: list[list[int]]) -> None:
    together = Histogram()
    for part in parts:
        together.add(Histogram(part))
    everything = [value for part in parts for value in part]
    values, counts = together.arrays()
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == Counter(everything)
    assert together.describe().total == sum(everything)


def test_labels_that_are_no_class_numbers_are_found(tmp_path: Path) -> None:
    labels: list[str | int] = ["3", "9" * 5_000, 2**63, "cat"]
    samples = [sample(number, jpg=picture(number), cls=label) for number, label in enumerate(labels)]
    report, _ = check_shards([str(write_shard(tmp_path / "a.tar", samples))], PLAIN, workers=1)
    assert {kind: found.count for kind, found in report.problems.items()} == {"unreadable label": 3}
    assert report.bad_samples == 3
