"""The counting set of shards: what a plain loop over json would keep, the same however it is made."""

import json
import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.counting.detections import read_detections
from data.counting.folder import JOURNAL, LEDGER, REPORT, CountingFolder, write_counting_set
from data.counting.report import CountingReport
from data.counting.source import Candidate, CaptionsOnly, CountSource, FieldCounts, Seen
from data.filter.names import output_names
from data.loading.heldout import HeldOutSet
from data.scenes.writer import RenderJob
from data.scenes.writer import write_shard as write_scenes
from data.shards.cache import ShardCache
from tests.data.counting.sets import expected, kept_in, tars_of
from tests.data.filter.by_webdataset import read_by_webdataset
from tests.data.small_shards import SAMPLE, picture, sample, with_json, write_shard
from tests.ranks import _CONTEXT
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec

COUNTS = FieldCounts("counts")
ALL = 10**6


def made(
    shards: Sequence[str], out: Path, source: CountSource = COUNTS, most: int | None = ALL, seed: int = 0
) -> CountingReport:
    return write_counting_set(CountingFolder(output_names(sorted(shards)), out, source, seed, most), World()).report


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Scenes of one to ten objects, and scenes of several kinds, in three shards."""
    folder = tmp_path_factory.mktemp("scenes")
    jobs = [
        RenderJob(folder / "few.tar", "counting", 0, 60, 8, 32),
        RenderJob(folder / "a.tar", "train", 0, 50, 8, 32),
        RenderJob(folder / "b.tar", "train", 50, 100, 8, 32),
    ]
    for job in jobs:
        write_scenes(job)
    return [str(job.path) for job in jobs]


@pytest.fixture(scope="module")
def truth(scenes: list[str]) -> dict[str, dict[str, Any]]:
    """The json of every scene, by key."""
    samples = (one for shard in scenes for one in read_by_webdataset(Path(shard)))
    return {str(one["__key__"]): json.loads(one["json"]) for one in samples}


def test_scenes_are_kept_as_a_loop_over_their_json_says(
    scenes: list[str], truth: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    report = made(scenes, tmp_path / "out")
    wanted = {key: expected(one["captions"], one["counts"]) for key, one in truth.items()}
    kept = kept_in(tmp_path / "out")
    assert {key: (one["number"], one["captions"]) for key, one in kept.items()} == {
        key: one for key, one in wanted.items() if one is not None
    }
    assert 40 < len(kept) == report.kept < len(truth) == report.samples
    for key, one in kept.items():
        assert {**one, "captions": truth[key]["captions"]} == {**truth[key], "number": one["number"]}
    believed = made(scenes, tmp_path / "naive", CaptionsOnly())
    naive = {key for key, one in truth.items() if expected(one["captions"], None) is not None}
    assert set(kept_in(tmp_path / "naive")) == naive > set(kept)
    assert believed.kept == len(naive)
    held_out = HeldOutSet([str(tmp_path / "out/*.tar")], ImageSpec(size=16), cache=ShardCache())
    assert len(held_out) == len(kept)


def test_files_of_counts_of_detections_and_of_coco_make_the_same_set(
    scenes: list[str], truth: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    made(scenes, tmp_path / "json")
    whole = tars_of(tmp_path / "json")
    labels = {key: [f"{o['colour']} {o['shape']}" for o in one["objects"]] for key, one in truth.items()}
    unsure = [{"label": "red circle", "score": 0.3}] * 9
    categories = {
        name: place for place, name in enumerate(sorted({name for names in labels.values() for name in names}))
    }
    coco = {
        "images": [{"id": place, "file_name": f"{key}.jpg"} for place, key in enumerate(truth)],
        "annotations": [
            {"image_id": place, "category_id": categories[name], "bbox": [0, 0, 1, 1], "iscrowd": 0}
            for place, key in enumerate(truth)
            for name in labels[key]
        ],
        "categories": [{"id": place, "name": name} for name, place in categories.items()],
    }
    files = {
        "counts.jsonl": "\n".join(json.dumps({"key": key, "counts": one["counts"]}) for key, one in truth.items()),
        "detections.jsonl": "\n".join(
            json.dumps({"key": key, "detections": [{"label": name, "score": 0.9} for name in names] + unsure})
            for key, names in labels.items()
        ),
        "coco.json": json.dumps(coco),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        made(scenes, tmp_path / f"by {name}", read_detections(tmp_path / name, "key", 0.5))
        assert tars_of(tmp_path / f"by {name}") == whole, name


def numbers_of(kept: dict[str, dict[str, Any]]) -> Counter[int]:
    return Counter(one["number"] for one in kept.values())


def test_small_numbers_are_made_as_rare_as_large_ones_by_seed_and_sample_alone(
    scenes: list[str], tmp_path: Path
) -> None:
    made(scenes, tmp_path / "all")
    there = numbers_of(kept_in(tmp_path / "all"))
    most = max(there[number] for number in range(7, 11))
    assert there[2] > most > 2
    report = made(scenes, tmp_path / "default", most=None)
    default = kept_in(tmp_path / "default")
    assert numbers_of(default) == {number: min(count, most) if number < 7 else count for number, count in there.items()}
    assert report.kept_at_most == most
    assert [report.numbers[str(n)]["balance"] for n in range(2, 11)] == [
        max(0, there[n] - most) if n < 7 else 0 for n in range(2, 11)
    ]
    made(scenes[::-1] + scenes[:1], tmp_path / "reversed", most=None)
    assert tars_of(tmp_path / "reversed") == tars_of(tmp_path / "default")
    made(scenes, tmp_path / "two", most=2)
    two = kept_in(tmp_path / "two")
    assert set(two) < set(default)
    assert numbers_of(two) == {number: min(count, 2) if number < 7 else count for number, count in there.items()}
    made(scenes, tmp_path / "other", most=2, seed=1)
    assert numbers_of(kept_in(tmp_path / "other")) == numbers_of(two)
    assert set(kept_in(tmp_path / "other")) != set(two)
    assert (
        made(scenes[1:2], tmp_path / "none", COUNTS, most=None).kept_at_most
        == max((numbers_of(kept_in(tmp_path / "none"))[number] for number in range(7, 11)), default=0)
        or None
    )


def odd(folder: Path) -> list[str]:
    """A sample for each thing that can become of one, and a page that is no tar."""
    dogs = ["two dogs"]
    samples: list[SAMPLE] = [
        with_json(0, captions=["dogs", "Two dogs", "two dogs", "two dogs, three cats"], counts={"dog": 2}, near=1.5),
        with_json(1, captions=["a dog"], counts={"dog": 2}),
        with_json(2, captions=["two dogs, three cats"], counts={"dog": 2}),
        with_json(3, captions=["two dogs", "three dogs"], counts={"dog": 2}),
        with_json(4, captions=dogs, counts={}),
        with_json(5, captions=dogs),
        with_json(6, captions=dogs, counts={"dog": 3, "cat": 1}),
        with_json(7, captions=dogs, counts={"dog": 2, "cat": 3}),
        sample(8, jpg=picture(8), json="{cut"),
        sample(9, jpg=picture(9)[:200], json=json.dumps({"captions": dogs, "counts": {"dog": 2}})),
        with_json(10, captions=dogs, counts={"dog": "two"}),
        sample(11, jpg=picture(11), txt="Three cats", json='{"counts": {"cat": 3}}', cls=4),
        with_json(12, caption=["cats", "three cats"], counts={"cat": 3, "dog": 3}),
        sample(13, jpg=picture(13), txt="a dog", json=json.dumps({"captions": dogs, "counts": {"dog": 2}})),
        sample(14, jpg=picture(14), cls=3),
        sample(15, json=json.dumps({"captions": dogs, "counts": {"dog": 2}})),
    ]
    (folder / "b").mkdir(parents=True)
    (folder / "b/page.tar").write_text("<html>no such file</html>")
    return [str(write_shard(folder / "a/odd.tar", samples)), str(folder / "b/page.tar")]


def test_every_reason_is_counted_and_what_is_broken_is_named(tmp_path: Path) -> None:
    report = made(odd(tmp_path / "in"), tmp_path / "out")
    assert report.without_number == {
        "no number": 2,
        "several numbers": 1,
        "captions disagree": 1,
        "unusable": 1,
    }
    two = {"captions": 11, "samples": 9, "no detections": 2, "count differs": 1, "most frequent class differs": 1}
    assert report.numbers["2"] == {**two, "unusable": 3, "detections of several samples": 0, "balance": 0, "kept": 2}
    assert (report.numbers["3"]["captions"], report.numbers["3"]["kept"]) == (3, 2)
    assert (report.samples, report.kept, report.shards, report.shards_written) == (16, 4, 2, 1)
    ledger = [json.loads(line) for line in (tmp_path / "out" / LEDGER).read_text().splitlines()]
    assert [one["key"] for one in ledger] == ["000008", "000009", "000010", "000015", ""]
    assert "class 'dog': a number of objects is needed" in ledger[2]["reason"]
    assert "page.tar is no tar file" in ledger[4]["reason"]
    assert json.loads((tmp_path / "out" / REPORT).read_text())["numbers"] == report.numbers


def test_written_samples_keep_all_but_captions_that_do_not_name_the_number(tmp_path: Path) -> None:
    shards = odd(tmp_path / "in")
    made(shards, tmp_path / "out")
    (copy,) = (tmp_path / "out").rglob("*.tar")
    assert copy == tmp_path / "out/a/odd.tar"
    before = {one["__key__"]: one for one in read_by_webdataset(Path(shards[0]))}
    after = {one["__key__"]: one for one in read_by_webdataset(copy)}
    assert list(after) == ["000000", "000011", "000012", "000013"]
    new_json = {key: json.loads(one.pop("json")) for key, one in after.items()}
    assert new_json == {
        "000000": {"captions": ["Two dogs", "two dogs"], "counts": {"dog": 2}, "near": 1.5, "number": 2},
        "000011": {"captions": ["Three cats"], "counts": {"cat": 3}, "number": 3},
        "000012": {"caption": ["three cats"], "captions": ["three cats"], "counts": {"cat": 3, "dog": 3}, "number": 3},
        "000013": {"captions": ["two dogs"], "counts": {"dog": 2}, "number": 2},
    }
    assert after["000013"].pop("txt") == b"two dogs"
    for key, one in after.items():
        assert one == {name: part for name, part in before[key].items() if name in one}


def lines_of(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_names_that_no_sample_has_are_told_and_one_that_several_have_is_nobodys(tmp_path: Path) -> None:
    dogs = {"captions": ["two dogs"]}
    shards = [
        str(write_shard(tmp_path / f"in/{name}.tar", [with_json(n, **dogs, source_name=f"{n}.jpg") for n in numbers]))
        for name, numbers in {"a": [1, 2, 3], "b": [3, 4]}.items()
    ]
    names = ["x.jpg", *(f"{n}.jpg" for n in (1, 2, 3, 4)), *(f"{n}.png" for n in range(12))]
    file = lines_of(tmp_path / "d.jsonl", [{"source_name": name, "counts": {"dog": 2}} for name in names])
    report = made(shards, tmp_path / "out", read_detections(file, "source_name", 0.5))
    assert set(kept_in(tmp_path / "out")) == {"000001", "000002", "000004"}
    assert report.numbers["2"]["detections of several samples"] == 2
    assert report.unknown_names == 13
    assert report.first_unknown_names == ("x.jpg", *(f"{n}.png" for n in range(9)))
    file = lines_of(tmp_path / "d.jsonl", [{"key": name, "counts": {"dog": 2}} for name in names])
    with pytest.raises(UserError) as caught:
        made(shards, tmp_path / "none", read_detections(file, "key", 0.5))
    assert str(caught.value) == (
        f"--detections {file}: names none of the samples: it names 'x.jpg', '1.jpg', '2.jpg'; a sample has the key "
        "'000001'; --join FIELD compares a field of the samples' json"
    )
    with pytest.raises(UserError, match=r"no sample has this field \(sample 000001: nearest: source_name"):
        made(shards, tmp_path / "none", FieldCounts("source_names"))
    assert not (tmp_path / "none").exists()


class Watched(CountSource):
    """Counts of the json, four candidates at a time, until so many parts were asked for; it notes who was looked at."""

    together = 4

    def __init__(self, dies_after: int | None = None) -> None:
        self.parts: list[list[str]] = []
        self._left = dies_after

    def plan(self) -> dict[str, Any]:
        return {"detections": "watched"}

    def counts(self, candidates: Sequence[Candidate]) -> Sequence[Seen]:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left = None if self._left is None else self._left - 1
        self.parts.append([one.sample.key for one in candidates])
        return COUNTS.counts(candidates)

    def nothing_known(self, key: str, fields: Any) -> str:
        raise NotImplementedError


def killed_after(shards: list[str], out: Path, parts: int) -> None:
    made(shards, out, Watched(parts), most=None)


def test_killed_torn_and_gone_on_it_is_the_same_bytes_and_nobody_is_looked_at_twice(
    scenes: list[str], tmp_path: Path
) -> None:
    whole = Watched()
    report = made(scenes, tmp_path / "whole", whole, most=None)
    keys = [key for part in whole.parts for key in part]
    assert len(keys) == len(set(keys)) > 60
    out = tmp_path / "killed"
    life = _CONTEXT.Process(target=killed_after, args=(scenes, out, 8))
    life.start()
    life.join(60)
    assert life.exitcode == -signal.SIGKILL
    journal = (out / JOURNAL).read_text().splitlines(keepends=True)
    assert len(journal) == 1 + 8
    (out / JOURNAL).write_text("".join(journal)[:-3])  # the last line cut: that part is lost
    second = Watched()
    assert made(scenes, out, second, most=None) == report
    assert second.parts == whole.parts[7:]
    assert tars_of(out) == tars_of(tmp_path / "whole")
    assert (out / REPORT).read_bytes() == (tmp_path / "whole" / REPORT).read_bytes()
    names = sorted(tars_of(out))
    (out / names[0]).unlink()
    (out / names[1]).write_bytes(b"torn")
    last = (out / names[2]).stat()
    third = Watched()
    assert made(scenes, out, third, most=None) == report
    assert third.parts == []
    assert tars_of(out) == tars_of(tmp_path / "whole")
    assert (out / names[2]).stat().st_ino == last.st_ino
    assert not list(out.rglob("*.partial"))


def test_a_folder_of_another_set_or_of_other_files_is_refused_in_one_line(tmp_path: Path) -> None:
    shards = odd(tmp_path / "in")
    out = tmp_path / "out"
    made(shards, out)
    before = tars_of(out)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"source": CaptionsOnly()}, "detections was 'json:counts', is now 'none'"),
        ({"seed": 1}, "seed was 0, is now 1"),
        ({"most": 5}, "most_per_number was 1000000, is now 5"),
        ({"shards": shards[:1]}, "shards was '2 "),
    ]
    for changes, message in cases:
        arguments: dict[str, Any] = {"shards": shards, "out": out, **changes}
        with pytest.raises(UserError, match=message) as caught:
            made(**arguments)
        assert "\n" not in str(caught.value)
    os.utime(shards[0], ns=(0, 0))
    with pytest.raises(UserError, match=r"odd\.tar has changed since it was read for .*out; name a new folder"):
        made(shards, out)
    with pytest.raises(UserError, match=r"--out: .*/in holds other files; name a new folder"):
        made(shards, tmp_path / "in")
    assert tars_of(out) == before
