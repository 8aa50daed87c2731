"""Pass 3: the verdicts on one shard, its filtered copy, and how many each rule dropped."""

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl

from data.check.samples import OpenShard, StoredSample
from data.filter.extract import Extracted, write_table
from data.filter.rules import AlignRules
from data.filter.verdicts import NO_RULE, RULES, Lists, apply_rules, drops
from data.samples.captions import listed
from data.shards.tar_writing import add_member, tar_aside

LEVELS: Final = ("samples", "captions")


@dataclass(frozen=True)
class WriteJob:
    """A shard, the rules, where its filtered copy goes (None: nowhere), and where the list of its kept samples goes."""

    extracted: Extracted
    rules: AlignRules
    lists: Lists
    target: Path | None
    kept: Path


@dataclass(frozen=True)
class Dropped:
    """Of the samples or captions of a shard: all, those kept, and for each rule those it dropped first, or would alone.

    A sample is dropped by the rule at which, rule by rule, its last caption goes.
    """

    total: int
    kept: int
    first: dict[str, int]
    alone: dict[str, int]

    def plus(self, other: "Dropped") -> "Dropped":
        """Both together."""
        return Dropped(
            self.total + other.total,
            self.kept + other.kept,
            {rule: count + other.first[rule] for rule, count in self.first.items()},
            {rule: count + other.alone[rule] for rule, count in self.alone.items()},
        )


NOTHING: Final = Dropped(0, 0, dict.fromkeys(RULES, 0), dict.fromkeys(RULES, 0))


@dataclass(frozen=True)
class Filtered:
    """The outcome of one shard, by level ("samples", "captions")."""

    dropped: dict[str, Dropped]


def filter_shard(job: WriteJob) -> Filtered:
    """Judge every caption of a shard, write the kept ones' list and, unless it is there already, the filtered copy.

    Raises:
        UserError: the shard cannot be read any more.
        OSError: the copy cannot be written.
    """
    rows = apply_rules(pl.read_parquet(job.extracted.rows), job.rules, job.lists)
    kept_rows = (
        rows.filter(pl.col("first") == NO_RULE)
        .group_by("sample", maintain_order=True)
        .agg(pl.first("key"), pl.col("caption").alias("captions"))
    )
    named = kept_rows.select(pl.lit(job.extracted.shard).alias("shard"), "key", "captions")
    write_table(named.to_arrow(), job.kept)
    if job.target is not None and len(kept_rows) and not job.target.exists():
        captions = dict(zip(kept_rows["sample"].to_list(), map(set, kept_rows["captions"].to_list()), strict=True))
        write_kept(job.extracted.shard, captions, job.target)
    by_sample = rows.group_by("sample").agg(pl.max("first"), *(drops(rule).all() for rule in RULES))
    with_caption = rows.filter(pl.col("caption").is_not_null())
    return Filtered({"samples": _dropped(by_sample), "captions": _dropped(with_caption)})


def write_kept(shard: str, captions_by_place: Mapping[int, set[int]], path: Path) -> None:
    """Write the samples at the places `captions_by_place` names, with these of their captions; whole or not at all.

    Members are copied bit by bit, in their stored order; only a sample that loses some of several captions has its json
    written anew, and its txt where that held one of those. The same samples make the same file, always.
    """
    with OpenShard(shard) as open_shard, tar_aside(path) as tar:
        for sample in open_shard:
            if sample.position in captions_by_place:
                _add(sample, captions_by_place[sample.position], tar)


def _add(sample: StoredSample, captions: set[int], tar: tarfile.TarFile) -> None:
    fields = sample.fields()
    all_captions = sample.captions(fields)
    left = [caption for place, caption in enumerate(all_captions) if place in captions]
    for suffix in sample.members:
        stored = sample.read(suffix)
        if suffix == "json" and len(left) < len(all_captions):
            stored = with_captions(fields, captions)
        if suffix == "txt" and len(left) < len(all_captions) and stored.decode("utf-8", "replace").strip() not in left:
            stored = left[0].encode()
        add_member(tar, sample.key, suffix, stored)


def with_captions(fields: Mapping[str, Any], places: set[int]) -> bytes:
    """A json member with only those of several captions that are at `places`.

    They are numbered as they are read: without empty ones, from `captions` when it has any, else from `caption`.
    """
    names = ("captions", "caption")
    full = ((name, [text for text in listed(fields.get(name)) if text.strip()]) for name in names)
    name, captions = next((name, captions) for name, captions in full if captions)
    left = [caption for place, caption in enumerate(captions) if place in places]
    return json.dumps({**fields, name: left}).encode()


def _dropped(rows: pl.DataFrame) -> Dropped:
    first = dict(rows.group_by("first").len().iter_rows())
    return Dropped(
        total=len(rows),
        kept=first.get(NO_RULE, 0),
        first={rule: first.get(number, 0) for number, rule in enumerate(RULES)},
        alone={rule: int(rows.select(drops(rule).sum()).item()) for rule in RULES},
    )
