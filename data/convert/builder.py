"""The build of webdataset shards from a table: the same bytes from any number of processes, and through any kill."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from data.convert.classes import CLASSES, Classes, find_classes
from data.convert.entry import ColumnRoles, Entry, entry_of
from data.convert.indexing import index_folder, index_shard
from data.convert.journal import Journal, JournalKind, open_journal
from data.convert.shard import ShardJob, ShardResult, write_shard
from data.convert.source import BuildSource, open_table
from data.convert.table import Groups, SourceTable
from data.pools.base import Pool, Workers
from data.pools.local import open_pool
from data.randomness import Permutation
from data.samples.bad_sample import BadSampleError
from vlm.aside import remove_files
from vlm.atomic import write_text
from vlm.errors import UserError
from vlm.paths import output_folder

BuildJournal = Journal[ShardResult]
LEDGER: Final = "build-ledger.jsonl"
JOURNAL: Final = "build-journal.jsonl"
BUILD: Final = JournalKind(JOURNAL, ShardResult, "build", "building")
_WHERE: Final = "vlm data build"
_ASIDE = ".build-images"
_PROBED_ROWS = 64
_ADDRESS = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True)
class BuildOptions:
    """The options on which the bytes of the shards depend, and how many bad rows are too many.

    `size` is the most pixels of the shorter side, `quality` the JPEG quality from which on images are stored coarser;
    None changes nothing. `shuffle` keys the order of the samples, so that the first shards are a fair sample of all;
    None keeps the order of the table.
    """

    samples_per_shard: int = 1000
    prefix: str = "shard"
    size: int | None = None
    quality: int | None = None
    shuffle: int | None = 0
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("samples_per_shard", "size", "quality"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, found {value}")
        if self.quality is not None and self.quality > 100:
            raise UserError(f"quality must be at most 100, found {self.quality}")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"max_bad_share is a share between 0 and 1, found {self.max_bad_share}")
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.prefix):
            raise UserError(f"prefix names files: letters, digits, '-', '_' and '.', found {self.prefix!r}")


@dataclass(frozen=True)
class BuildProgress:
    """Progress of a build: samples (or, while images are set aside, rows) done, of how many, and how many were bad."""

    stage: str
    done: int
    total: int
    bad: int


@dataclass(frozen=True)
class BuildSummary:
    """The result of a build: the shards in order, the samples in them, bad rows by reason, and columns left out."""

    folder: Path
    shards: tuple[Path, ...]
    num_samples: int
    num_bytes: int
    num_bad: int
    reasons: dict[str, int]
    left_out: tuple[str, ...]
    num_classes: int | None = None


def build_shards(
    source: BuildSource,
    folder: Path,
    options: BuildOptions,
    *,
    workers: Workers = None,
    report: Callable[[BuildProgress], None] = lambda _: None,
) -> BuildSummary:
    """Write the shards of `source` into `folder`, from `workers` processes (default: one a core).

    Called again after a kill, it goes on from the finished shards; called again at the end, it does nothing. Rows that
    cannot be used are left out and listed in build-ledger.jsonl with row (from 0), path and reason.

    Raises:
        UserError: the source or the folder cannot be used, or too many rows are bad (the shards stay).
    """
    folder = output_folder(folder, "OUT_DIR", files=(LEDGER, JOURNAL, CLASSES))
    table = open_table(source)
    if len(table) == 0:
        raise UserError(f"{source.path}: holds no rows")
    columns, classes = _usable_columns(table, source)
    groups = Groups(table.image_paths(), len(table))
    build = _Build(table, columns, classes, groups, folder.absolute(), source.image_root, options)
    try:
        with open_journal(build.folder, build.plan(), BUILD, f"{options.prefix}-*.tar") as journal:
            with open_pool(_checked(workers)) as processes:
                try:
                    build.run(journal, processes, report)
                finally:
                    write_text(build.folder / LEDGER, _ledger(journal))
            remove_files(build.folder / _ASIDE, r"\d{5}-\d{5}\..*")
            if classes is not None:
                write_text(build.folder / CLASSES, json.dumps({"classes": classes.names}, indent=1) + "\n")
            summary = build.summary(journal)
            index_folder(summary.shards, _WHERE)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    if summary.num_bad > options.max_bad_share * build.num_samples:
        raise UserError(_too_many(summary, build.num_samples, options.max_bad_share))
    return summary


@dataclass(frozen=True)
class _Build:
    table: SourceTable
    columns: ColumnRoles
    classes: Classes | None
    groups: Groups
    folder: Path
    root: Path
    options: BuildOptions

    @property
    def num_samples(self) -> int:
        return len(self.groups)

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.options.samples_per_shard)

    def plan(self) -> dict[str, Any]:
        """All that the bytes of the shards depend on, the images' own files apart."""
        options = asdict(self.options)
        del options["max_bad_share"]
        columns = {f"{name} column": value for name, value in asdict(self.columns).items()}
        columns["captions column"] = list(self.columns.captions)
        named = {} if self.classes is None else {"classes": list(self.classes.names)}
        return {
            "format": 1,
            **options,
            **columns,
            **named,
            "root": str(self.root),
            "table": self.table.fingerprint[:16],
        }

    def shard(self, number: int) -> Path:
        return self.folder / f"{self.options.prefix}-{number:06d}.tar"

    def run(self, journal: BuildJournal, processes: Pool, report: Callable[[BuildProgress], None]) -> None:
        """Write what is missing."""
        missing = [number for number in range(self.num_shards) if not self._is_there(journal.results.get(number))]
        for number in missing:
            journal.results.pop(number, None)
        if not missing:
            return
        self.table.prepare(
            self.folder / _ASIDE,
            processes,
            lambda done, total: report(BuildProgress("setting images aside", done, total, 0)),
        )
        report(self._progress(journal))
        for shard in processes.as_done(write_shard, self._jobs(missing)):
            if shard.num_samples:
                index_shard(self.shard(shard.number), _WHERE)
            journal.add(shard)
            report(self._progress(journal))

    def summary(self, journal: BuildJournal) -> BuildSummary:
        shards = [journal.results[number] for number in range(self.num_shards)]
        bad = [row for shard in shards for row in shard.bad]
        return BuildSummary(
            folder=self.folder,
            shards=tuple(self.shard(shard.number) for shard in shards if shard.num_samples),
            num_samples=sum(shard.num_samples for shard in shards),
            num_bytes=sum(shard.num_bytes for shard in shards),
            num_bad=len(bad),
            reasons=dict(Counter(row.reason for row in bad).most_common()),
            left_out=self.table.left_out,
            num_classes=None if self.classes is None else len(self.classes.names),
        )

    def _is_there(self, shard: ShardResult | None) -> bool:
        if shard is None:
            return False
        path = self.shard(shard.number)
        return (path.stat().st_size if path.exists() else 0) == shard.num_bytes

    def _progress(self, journal: BuildJournal) -> BuildProgress:
        shards = journal.results.values()
        bad = sum(len(shard.bad) for shard in shards)
        return BuildProgress("building", sum(shard.num_samples for shard in shards) + bad, self.num_samples, bad)

    def _jobs(self, numbers: list[int]) -> Iterator[ShardJob]:
        """The jobs one by one: only those that are under way hold their rows."""
        step = self.options.samples_per_shard
        digits = max(9, len(str(self.num_samples - 1)))
        order = None
        if self.options.shuffle is not None:
            order = Permutation(self.num_samples, "build", self.options.shuffle)
        for number in numbers:
            positions = np.arange(number * step, min((number + 1) * step, self.num_samples))
            samples = positions if order is None else order(positions)
            rows = [self.groups.rows(sample) for sample in samples.tolist()]
            values = iter(self.table.fetch(np.concatenate(rows)))
            entries = tuple(
                self._numbered(
                    entry_of(
                        int(sample_rows[0]), f"{position:0{digits}d}", [next(values) for _ in sample_rows], self.columns
                    )
                )
                for position, sample_rows in zip(positions.tolist(), rows, strict=True)
            )
            yield ShardJob(number, self.shard(number), entries, self.root, self.options.size, self.options.quality)

    def _numbered(self, entry: Entry) -> Entry:
        return entry if self.classes is None else replace(entry, label=self.classes.number(entry.label))


def _usable_columns(table: SourceTable, source: BuildSource) -> tuple[ColumnRoles, Classes | None]:
    """The table's columns and classes, after a look at some rows: a wrong column or root is refused before the build.

    Raises:
        UserError: the images are addresses, none of them is there, or the label asked for is none.
    """
    columns = table.columns
    rows = [row for row in table.fetch(_spread(len(table))) if not isinstance(row, BadSampleError)]
    names = [str(row[columns.image]) for row in rows if isinstance(row.get(columns.image), str)]
    address = next((name for name in names if _ADDRESS.match(name)), None)
    if address is not None:
        raise UserError(
            f"{source.path}: column {columns.image} holds addresses ({address:.60}), which are not fetched: download "
            "the images first, for instance with img2dataset, or name a column of paths with --image-column"
        )
    root = source.image_root
    if names and not any(os.path.exists(root / os.path.expanduser(name)) for name in names):
        raise UserError(
            f"{source.path}: none of {len(names)} images looked for is there, such as {root / names[0]!s:.200}; "
            f"name the folder that its paths start from with --root, or, if {columns.image} is no column of paths, "
            "the one that is with --image-column"
        )
    is_required = source.columns.label is not None or source.class_folders
    return find_classes(table, columns, is_required, source.classes)


def _spread(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, num=min(count, _PROBED_ROWS)).astype(np.int64))


def _checked(workers: Workers) -> Workers:
    if isinstance(workers, int) and workers < 1:
        raise UserError(f"workers must be at least 1, found {workers}")
    return workers


def _ledger(journal: BuildJournal) -> str:
    shards = [journal.results[number] for number in sorted(journal.results)]
    return "".join(json.dumps(asdict(row)) + "\n" for shard in shards for row in shard.bad)


def _too_many(summary: BuildSummary, total: int, most: float) -> str:
    reasons = "; ".join(f"{count:,} x {reason}" for reason, count in list(summary.reasons.items())[:3])
    return (
        f"{summary.num_bad:,} of {total:,} samples ({summary.num_bad / total:.1%}) could not be used, more than "
        f"max-bad-share {most:.1%} ({reasons}); all are listed in {summary.folder / LEDGER}, the shards stay"
    )
