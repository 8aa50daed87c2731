"""Copies of shards with captions, by a captioner that names what it sees: whole, the same through any kill."""

import gzip
import hashlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.check.samples import FindingError, StoredSample
from data.filter.names import output_names
from data.generated.fields import CaptionField, GeneratedCaption, Origin
from data.generated.folder import CAPTIONING, JOURNAL, LEDGER, CaptionFolder, CaptionSummary, write_captions
from data.loading.heldout import HeldOutSet
from data.shards.cache import ShardCache
from tests.data.filter.by_webdataset import read_by_webdataset
from tests.data.small_shards import picture, sample, with_json, write_shard
from tests.ranks import _CONTEXT
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec

ORIGIN = Origin("0123", {"method": "greedy"})
FIELDS = '{"captions":  ["one", "two"], "near": 1.50}'


def seen(one: StoredSample) -> str:
    """A caption that an image's bytes alone decide."""
    return f"picture {hashlib.sha256(one.image()).hexdigest()[:6]}"


def see(samples: Sequence[StoredSample]) -> list[GeneratedCaption | str]:
    made: list[GeneratedCaption | str] = []
    for one in samples:
        try:
            made.append(GeneratedCaption(seen(one), -1.5, 2, one.position / 10))
        except FindingError as error:
            made.append(str(error))
    return made


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Shards of two folders, one of them gzipped; with samples that can have no caption, and a page that is no tar."""
    odd = [
        sample(0, jpg=picture(0), txt="zero", cls=7),
        {**sample(1, jpg=picture(1), json=FIELDS), "depth.npy": b"\x00\x01"},
        with_json(2, captions=["three"]),
        sample(3, jpg=picture(3), json="{cut"),
        sample(4, jpg=b"", txt="empty"),
        with_json(5, captions=[], generated_captions="somebody's own"),
    ]
    names = [str(write_shard(tmp_path / "in/a/odd.tar", odd))]
    plain = write_shard(tmp_path / "in/b/more.tar", [sample(n) for n in range(10, 13)])
    (tmp_path / "in/b/zipped.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "in/b/page.tar").write_text("<html>no such file</html>")
    return [*names, str(plain), *(str(tmp_path / f"in/b/{name}") for name in ("page.tar", "zipped.tar.gz"))]


def folder(shards: Sequence[str], out: Path, together: int = 4, min_score: float | None = None) -> CaptionFolder:
    return CaptionFolder(output_names(sorted(shards)), out, CaptionField(), ORIGIN, min_score, together)


def contents(out: Path) -> dict[str, bytes]:
    files = [*out.rglob("*.tar"), out / LEDGER]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_all_members_stay_and_each_json_gains_the_caption(shards: list[str], tmp_path: Path) -> None:
    summary = write_captions(folder(shards, tmp_path / "out"), see, World())
    before, after = (read_by_webdataset(tmp_path / f"{place}/a/odd.tar") for place in ("in", "out"))
    for old, new in zip(before, after, strict=True):
        assert {name: part for name, part in new.items() if name != "json"} == {
            name: part for name, part in old.items() if name != "json"
        }
    unchanged = [new["json"] == old["json"] for old, new in zip(before[3:], after[3:], strict=True) if "json" in old]
    assert unchanged == [True, True]
    assert "json" not in after[4]
    first, second, third = (json.loads(one["json"]) for one in after[:3])
    digests = [hashlib.sha256(picture(number)).hexdigest()[:6] for number in range(3)]
    assert [one["generated_captions"] for one in (first, second, third)] == [[f"picture {name}"] for name in digests]
    assert set(first) == {"generated_captions", "generated_captions_provenance"}
    assert (second["captions"], second["near"], third["captions"]) == (["one", "two"], 1.5, ["three"])
    assert (summary.num_samples, summary.num_captions, summary.num_below) == (12, 9, 0)
    reasons = {one.key: one.reason for _, one in summary.left_out}
    assert set(reasons) == {"000003", "000004", "000005", ""}
    assert "page.tar is no tar file" in reasons[""]
    ledger = [json.loads(line) for line in (tmp_path / "out" / LEDGER).read_text().splitlines()]
    assert [(one["shard"], one["key"], one["reason"]) for one in ledger] == [
        (sorted(shards)[number], one.key, one.reason) for number, one in summary.left_out
    ]
    assert not (tmp_path / "out/b/page.tar").exists()
    assert {path.name for path in (tmp_path / "out/b").iterdir()} >= {"vlm-index.json.gz", "more.tar.idx", "zipped.tar"}
    held_out = HeldOutSet([str(tmp_path / "out/*/*.tar")], ImageSpec(size=16), cache=ShardCache())
    assert len(held_out) == 12


def test_captions_below_the_score_are_left_out_and_counted(shards: list[str], tmp_path: Path) -> None:
    summary = write_captions(folder(shards[1:2], tmp_path / "out", min_score=0.1), see, World())
    (shard,) = (tmp_path / "out").glob("*.tar")
    assert ["json" in one for one in read_by_webdataset(shard)] == [False, True, True]
    assert (summary.num_captions, summary.num_below, summary.left_out) == (2, 1, [])


def killed_after(shards: list[str], out: Path, num_groups: int) -> None:
    """Write until so many groups of samples are captioned, then die in the middle of a shard."""
    calls = 0

    def see_or_die(samples: Sequence[StoredSample]) -> list[GeneratedCaption | str]:
        nonlocal calls
        calls += 1
        if calls > num_groups:
            os.kill(os.getpid(), signal.SIGKILL)
        return see(samples)

    write_captions(folder(shards, out, together=1), see_or_die, World())


def test_killed_torn_and_gone_on_it_is_the_same_bytes(shards: list[str], tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    write_captions(folder(shards, whole), see, World())
    life = _CONTEXT.Process(target=killed_after, args=(shards, out, 7))  # within the second shard
    life.start()
    life.join(60)
    assert life.exitcode == -signal.SIGKILL
    first = (out / "a/odd.tar").stat()
    assert not (out / "b/more.tar").exists()
    assert list((out / "b").glob(".*.partial"))
    write_captions(folder(shards, out), see, World())
    assert contents(out) == contents(whole)
    assert (out / "a/odd.tar").stat().st_ino == first.st_ino
    assert not list(out.rglob("*.partial"))
    with (out / "b/more.tar").open("r+b") as torn:
        torn.truncate(700)
    journal = (out / JOURNAL).read_bytes()
    (out / JOURNAL).write_bytes(journal[:-3])  # the last line cut
    captioned: list[str] = []

    def noting(samples: Sequence[StoredSample]) -> list[GeneratedCaption | str]:
        captioned.extend(one.shard.name for one in samples)
        return see(samples)

    write_captions(folder(shards, out), noting, World())
    assert contents(out) == contents(whole)
    assert set(captioned) == {shards[1], shards[3]}
    captioned.clear()
    write_captions(folder(shards, out), noting, World())
    assert captioned == []


def test_a_line_of_the_journal_about_a_shard_that_is_not_there_counts_for_nothing(
    shards: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = summary_of(shards, out)
    with (out / JOURNAL).open("a") as journal:
        journal.writelines(CAPTIONING.line(replace(summary.shards[1], number=number)) for number in (-2, 99))
    assert summary_of(shards, out) == summary


def summary_of(shards: list[str], out: Path, **changes: Any) -> CaptionSummary:
    return write_captions(replace(folder(shards, out), **changes), see, World())


def test_a_folder_of_other_captions_is_refused_in_one_line(shards: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary_of(shards, out)
    before = contents(out)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"origin": Origin("4567", ORIGIN.options)}, "another captioning .model was '0123', is now '4567'"),
        ({"origin": Origin("0123", {"method": "beam"})}, "method was 'greedy', is now 'beam'"),
        ({"field": CaptionField("other")}, "field was 'generated_captions', is now 'other'"),
        ({"min_score": 0.2}, "min_score was None, is now 0.2"),
        ({"names": output_names(shards[:2])}, "shards was '4 "),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            summary_of(shards, out, **changes)
        assert "\n" not in str(caught.value)
    os.utime(shards[1], ns=(0, 0))
    with pytest.raises(UserError, match=r"more\.tar has changed since .*out/b/more\.tar was made of it"):
        summary_of(shards, out)
    (out / "b/more.tar").unlink()
    summary_of(shards, out)
    assert contents(out) == before


def test_nothing_is_written_among_other_files(shards: list[str], tmp_path: Path) -> None:
    before = Path(shards[0]).read_bytes()
    with pytest.raises(UserError, match=r"--out: .*/in holds other files; name a new folder"):
        summary_of(shards, tmp_path / "in")
    assert Path(shards[0]).read_bytes() == before
