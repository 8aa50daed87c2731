"""The filter as a whole: exact counts, whole shards, the same result however it is run, and no work done twice."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.check.samples import hash64
from data.filter.counts import count
from data.filter.extract import Extracted, ExtractJob, extract
from data.filter.rules import AlignRules
from data.filter.run import FilterJob, filter_shards
from tests.data.check.photos import photo, stored
from tests.data.filter.by_webdataset import read_by_webdataset
from tests.data.small_shards import SAMPLE, sample, write_shard
from vlm.errors import UserError

RULES = AlignRules(min_side=20, max_images_per_text=2, min_ngram_count=2, min_words=1)
FILES = {number: stored(photo(number, (24 + number, 24)), "PNG") for number in range(6)}
WORDS = st.sampled_from(["red", "car", "blue", "dog", "a"])
CAPTIONS = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
SAMPLES = st.lists(st.tuples(st.sampled_from(sorted(FILES)), st.lists(CAPTIONS, min_size=1, max_size=3)), max_size=12)


def shards_of(folder: Path, samples: list[tuple[int, list[str]]], num_shards: int = 3) -> list[str]:
    made: list[SAMPLE] = [
        sample(place, png=FILES[image], json=json.dumps({"captions": texts, "more": place}), bin=b"\x00\xff")
        for place, (image, texts) in enumerate(samples)
    ]
    return [
        str(write_shard(folder / f"part-{number}.tar", made[number::num_shards]))
        for number in range(num_shards)
        if made[number::num_shards]
    ]


def noisy(folder: Path, count: int = 60) -> list[str]:
    """First captions that one image has, but for some shared or rare ones; second captions that few or many have."""
    names, shared = ["red", "blue", "dog", "car", "sun", "sea"], ["a red car", "a dog"]
    first = [f"picture of {names[n % 6]}" if n % 5 else f"unique{n}" if n % 2 else "img 1" for n in range(count)]
    second = [f"the {names[n % 6]} again" if n % 4 else shared[n // 4 % 2] for n in range(count)]
    return shards_of(folder, [(n % 6, [first[n], second[n]]) for n in range(count)])


def contents(folder: Path) -> dict[str, bytes]:
    """The files that the filter wrote, apart from its work folder and the names of folders."""
    files = [*folder.glob("*.tar"), folder / "kept.parquet"]
    return {path.name: path.read_bytes() for path in files}


def by_id(frame: pl.DataFrame) -> dict[int, int]:
    return dict(frame.iter_rows())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=SAMPLES.filter(bool), part_rows=st.sampled_from([2, 10_000_000]))
def test_the_counts_are_those_of_python_dictionaries(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[int, list[str]]], part_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("counts")
    for name in ("rows", "grams"):
        (folder / name).mkdir()
    extracted = [extract(ExtractJob(shard, folder)) for shard in shards_of(folder, samples)]
    counts = count(extracted, folder / "counts", "bytes", part_rows)
    images_of: dict[str, set[int]] = {}
    texts_of: dict[int, set[str]] = {}
    grams: Counter[str] = Counter()
    for image, texts in samples:
        for text in texts:
            images_of.setdefault(text, set()).add(image)
            texts_of.setdefault(image, set()).add(text)
            words = text.split()
            grams.update(words)
            grams.update(f"{first} {second}" for first, second in pairwise(words))
    assert by_id(counts.texts().collect()) == {hash64(text.encode()): len(ids) for text, ids in images_of.items()}
    assert by_id(counts.images().collect()) == {hash64(FILES[image]): len(ids) for image, ids in texts_of.items()}
    assert by_id(counts.grams().collect()) == {hash64(gram.encode()): number for gram, number in grams.items()}


def test_kept_samples_are_whole_and_the_others_gone(tmp_path: Path) -> None:
    shards = noisy(tmp_path / "in")
    report = filter_shards(FilterJob(tuple(shards), RULES, tmp_path / "out"), workers=1)
    listed = {
        (Path(shard).name, key): captions
        for shard, key, captions in pl.read_parquet(tmp_path / "out" / "kept.parquet").iter_rows()
    }
    lost = 0
    for shard in map(Path, shards):
        before = {one["__key__"]: one for one in read_by_webdataset(shard)}
        after = read_by_webdataset(tmp_path / "out" / shard.name)
        assert [one["__key__"] for one in after] == [key for key in before if (shard.name, key) in listed]
        for one in after:
            old = before[one["__key__"]]
            captions = listed[shard.name, one["__key__"]]
            if len(captions) == 2:
                assert one == old
            else:
                lost += 1
                fields = json.loads(old["json"])
                fields["captions"] = [fields["captions"][place] for place in captions]
                assert one == {**old, "json": one["json"]}
                assert json.loads(one["json"]) == fields
    assert 0 < lost < len(listed) == report.dropped["samples"].kept < 60
    assert report.dropped["captions"].kept == sum(map(len, listed.values()))
    saved = json.loads((tmp_path / "out" / "filter.json").read_text())
    assert saved == json.loads(json.dumps(report.to_json()))


def test_filtering_again_with_the_same_counts_drops_nothing(tmp_path: Path) -> None:
    tests = str(write_shard(tmp_path / "test.tar", [sample(0, png=FILES[3], txt="x")]))
    filter_shards(FilterJob(tuple(noisy(tmp_path / "in")), RULES, tmp_path / "one", (tests,)), workers=1)
    again = tuple(str(path) for path in (tmp_path / "one").glob("*.tar"))
    counts = tmp_path / "one" / "work" / "counts"
    report = filter_shards(FilterJob(again, RULES, tmp_path / "two", (tests,), counts=counts), workers=1)
    for level in report.dropped.values():
        assert level.total == level.kept > 0
        assert not any(level.alone.values())
    for path in map(Path, again):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_the_result_depends_neither_on_order_nor_on_repetition(tmp_path: Path) -> None:
    shards = noisy(tmp_path / "in")
    one = filter_shards(FilterJob(tuple(shards), RULES, tmp_path / "one"), workers=1)
    two = filter_shards(FilterJob((*shards[::-1], shards[0]), RULES, tmp_path / "two"), workers=1)
    assert one.dropped == two.dropped
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_list_alone_names_what_the_shards_would_hold(tmp_path: Path) -> None:
    shards = tuple(noisy(tmp_path / "in"))
    listed = filter_shards(FilterJob(shards, RULES, tmp_path / "list", list_only=True), workers=1)
    written = filter_shards(FilterJob(shards, RULES, tmp_path / "full"), workers=1)
    assert contents(tmp_path / "list") == {"kept.parquet": contents(tmp_path / "full")["kept.parquet"]}
    assert (listed.shards_written, written.shards_written) == (0, 3)
    assert listed.dropped == written.dropped


def test_a_killed_filter_goes_on_where_it_was(tmp_path: Path) -> None:
    shards = tuple(noisy(tmp_path / "in"))
    whole = filter_shards(FilterJob(shards, RULES, tmp_path / "whole"), workers=1)
    killed = """
import os, signal, sys
from pathlib import Path
import data.filter.run as run
from data.filter.rules import AlignRules
def hear(name, total):
    heard.append(name)
    if heard.count(name) == 3 and name == "reading shards":
        os.kill(os.getpid(), signal.SIGKILL)
heard = []
rules = AlignRules.model_validate_json(sys.argv[2])
run.filter_shards(run.FilterJob(tuple(sys.argv[3:]), rules, Path(sys.argv[1])), workers=1, progress=hear)
"""
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", killed, str(out), RULES.model_dump_json(), *shards], check=False)
    assert ended.returncode == -9
    done = {path: path.stat().st_mtime_ns for path in (out / "work" / "rows").glob("*.parquet")}
    assert len(done) == 2
    resumed = filter_shards(FilterJob(shards, RULES, out), workers=1)
    assert resumed.dropped == whole.dropped
    assert contents(out) == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    # Killed while it wrote shards: the missing one is written, the other ones stay.
    (out / "part-1.tar").unlink()
    before = (out / "part-0.tar").stat().st_mtime_ns
    filter_shards(FilterJob(shards, RULES, out), workers=1)
    assert contents(out) == contents(tmp_path / "whole")
    assert (out / "part-0.tar").stat().st_mtime_ns == before


def test_a_changed_shard_is_read_again(tmp_path: Path) -> None:
    (shard, *_) = noisy(tmp_path / "in")
    (tmp_path / "work" / "rows").mkdir(parents=True)
    (tmp_path / "work" / "grams").mkdir()
    first: Extracted = extract(ExtractJob(shard, tmp_path / "work"))
    os.utime(shard, ns=(1, 1))
    assert extract(ExtractJob(shard, tmp_path / "work")).rows != first.rows


def test_a_folder_with_other_contents_and_unfit_counts_are_refused(tmp_path: Path) -> None:
    shards = tuple(noisy(tmp_path / "in", 6))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        filter_shards(FilterJob(shards, RULES, tmp_path / "full"), workers=1)
    filter_shards(FilterJob(shards, RULES, tmp_path / "out"), workers=1)
    with pytest.raises(UserError, match="result of another filter"):
        filter_shards(FilterJob(shards, AlignRules(), tmp_path / "out"), workers=1)
    counts = tmp_path / "out" / "work" / "counts"
    by_url = RULES.model_copy(update={"image_identity": "url"})
    with pytest.raises(UserError, match="tells images apart by bytes, not by url"):
        filter_shards(FilterJob(shards, by_url, tmp_path / "new", counts=counts), workers=1)
    with pytest.raises(UserError, match="holds no counts"):
        filter_shards(FilterJob(shards, RULES, tmp_path / "new", counts=tmp_path / "in"), workers=1)


def test_copies_are_named_as_their_shards(tmp_path: Path) -> None:
    for name in ("x/a.tar", "y/a.tar.gz"):
        write_shard(tmp_path / name, [sample(0, png=FILES[0], txt="one two three")])
    shards = tuple(str(tmp_path / name) for name in ("x/a.tar", "y/a.tar.gz"))
    filter_shards(FilterJob(shards, AlignRules(min_side=0), tmp_path / "out"), workers=1)
    assert read_by_webdataset(tmp_path / "out" / "x" / "a.tar") == read_by_webdataset(tmp_path / "out" / "y" / "a.tar")
    write_shard(tmp_path / "x" / "a.tar.gz", [sample(1)])
    with pytest.raises(UserError, match=r"would both be written as a\.tar"):
        filter_shards(FilterJob((shards[0], shards[0] + ".gz"), RULES, tmp_path / "other"), workers=1)
