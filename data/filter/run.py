"""The filter from shards to filtered shards: its three passes, what it leaves behind, and what it reports."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from data.check.picture import NO_HASH
from data.check.samples import UNREADABLE_SHARD
from data.check.scan import ScanJob, scan_shard
from data.filter.counts import SETTINGS as COUNTED
from data.filter.counts import Counts, count, saved_counts
from data.filter.extract import Extracted, ExtractJob, extract
from data.filter.names import output_names
from data.filter.rules import AlignRules
from data.filter.verdicts import TestPictures, make_lists
from data.filter.write import LEVELS, NOTHING, Dropped, WriteJob, filter_shard
from data.pools.base import Pool, Workers
from data.pools.local import open_pool
from vlm.aside import remove_files
from vlm.atomic import flush_to_disk, write_text
from vlm.errors import UserError, reason
from vlm.paths import output_folder, write_output

REPORT: Final = "filter.json"
KEPT_LIST: Final = "kept.parquet"
SETTINGS: Final = "filter-settings.json"
WORK: Final = "work"

Work = TypeVar("Work")
Done = TypeVar("Done")
Progress = Callable[[str, int], None]
"""Called with the name of a pass and how many shards it will take, then with the name and 0 for each shard done."""


def _silent(_stage: str, _num_shards: int) -> None:
    pass


@dataclass(frozen=True)
class FilterJob:
    """The input and the output of a filter, and its rules.

    `out` gets the filtered shards, `kept.parquet` and `filter.json`; with `list_only` no shards. `work` (a folder in
    `out` by default) gets the rows of all shards and their counts; another run over the same shards finds them there.
    `counts` are saved ones to use instead. Pictures of the `exclude` shards, a test set's, are dropped.
    """

    shards: tuple[str, ...]
    rules: AlignRules
    out: Path
    exclude: tuple[str, ...] = ()
    work: Path | None = None
    counts: Path | None = None
    list_only: bool = False

    @property
    def work_folder(self) -> Path:
        """The folder for rows and counts."""
        return self.work or self.out / WORK


@dataclass(frozen=True)
class FilterReport:
    """Numbers of samples and captions that were kept, and that each rule dropped; `counts` is where the counts are."""

    shards: int
    shards_written: int
    excluded_pictures: int
    rules: dict[str, Any]
    counts: str
    dropped: dict[str, Dropped]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write the JSON file, whole or not at all. Raises UserError where it cannot be written."""
        write_output(path, json.dumps(self.to_json(), indent=1) + "\n", "figures of the filter")


def filter_shards(job: FilterJob, *, workers: Workers = None, progress: Progress = _silent) -> FilterReport:
    """Filter shards in `workers` processes (default: one a core).

    A run that was killed goes on where it was when it is started again. The result depends neither on the order of the
    shards nor on the processes; with saved counts, filtering the result again drops nothing.

    Raises:
        UserError: a shard cannot be read, the counts do not fit, or `out` holds something else.
    """
    targets = output_names(sorted(set(job.shards)))
    output_folder(job.out, "--out", files=(REPORT, KEPT_LIST, SETTINGS))
    output_folder(job.work_folder, "--work")
    try:
        _refuse_occupied(job)
        for name in ("rows", "grams", "kept"):
            (job.work_folder / name).mkdir(parents=True, exist_ok=True)
        with open_pool(workers) as pool:
            return _Passes(job, targets, pool, progress).run()
    except OSError as error:
        raise UserError(f"{error.filename or job.out}: {error.strerror or reason(error)}") from error
    except (pl.exceptions.PolarsError, pa.ArrowException) as error:
        folders = job.work_folder if job.counts is None else f"{job.work_folder} or {job.counts}"
        raise UserError(
            f"{folders}: what an earlier run left there is damaged ({reason(error)}); "
            "remove the folder: it is made anew"
        ) from error


@dataclass(frozen=True)
class _Passes:
    """One run of the filter; `targets` are the copies' names by shard."""

    job: FilterJob
    targets: dict[str, str]
    pool: Pool
    progress: Progress

    def run(self) -> FilterReport:
        """Extract, count, judge and write."""
        job = self.job
        extracted = self._all("reading shards", extract, [ExtractJob(name, job.work_folder) for name in self.targets])
        tests = self._test_pictures()
        counts = self._counts(extracted)
        name = _claim(job, extracted, counts, tests)
        lists = make_lists(counts, job.rules, tests, job.work_folder / f"lists-{name}")
        lists_of_kept = [job.work_folder / "kept" / f"{one.name}.parquet" for one in extracted]
        copies = [None if job.list_only else job.out / self.targets[one.shard] for one in extracted]
        jobs = [
            WriteJob(one, job.rules, lists, copy, place)
            for one, copy, place in zip(extracted, copies, lists_of_kept, strict=True)
        ]
        filtered = self._all("filtering", filter_shard, jobs)
        _write_list(lists_of_kept, job.out / KEPT_LIST)
        remove_files(lists.folder, r"\w+\.npy")
        report = FilterReport(
            shards=len(jobs),
            shards_written=sum(copy is not None and copy.exists() for copy in copies),
            excluded_pictures=len(tests.files),
            rules=job.rules.model_dump(mode="json"),
            counts=str(counts.folder),
            dropped={level: _sum(one.dropped[level] for one in filtered) for level in LEVELS},
        )
        report.write(job.out / REPORT)
        return report

    def _all(self, name: str, work: Callable[[Work], Done], jobs: Sequence[Work]) -> list[Done]:
        """One pass over shards, told as it goes on."""
        self.progress(name, len(jobs))
        done = []
        for result in self.pool.in_order(work, jobs):
            done.append(result)
            self.progress(name, 0)
        return done

    def _counts(self, extracted: Sequence[Extracted]) -> Counts:
        identity, saved = self.job.rules.image_identity, self.job.counts
        if saved is not None:
            return saved_counts(saved, identity)
        self.progress("counting", 1)
        counts = count(extracted, self.job.work_folder / "counts", identity)
        self.progress("counting", 0)
        return counts

    def _test_pictures(self) -> TestPictures:
        jobs = [ScanJob(shard, texts=False, listed=1) for shard in self.job.exclude]
        scans = self._all("reading test sets", scan_shard, jobs)
        for scan in scans:
            if scan.num_findings[UNREADABLE_SHARD]:
                raise UserError(f"--exclude: {scan.findings[0].reason}")
        nothing = np.zeros(0, dtype=np.uint64)
        pictures = np.concatenate([nothing, *(scan.image_hashes for scan in scans)])
        files = np.concatenate([nothing, *(scan.file_hashes for scan in scans)])
        return TestPictures(pictures[pictures != NO_HASH], files[files != NO_HASH])


def _sum(dropped: Iterable[Dropped]) -> Dropped:
    return reduce(Dropped.plus, dropped, NOTHING)


def _refuse_occupied(job: FilterJob) -> None:
    """Before hours of reading; whether a former filter was this very one is seen later."""
    if job.out.is_dir() and not (job.out / SETTINGS).is_file() and _entries(job):
        raise UserError(f"--out: {job.out} holds other files; name a new folder")


def _entries(job: FilterJob) -> list[Path]:
    return [entry for entry in job.out.iterdir() if entry.absolute() != job.work_folder.absolute()]


def _claim(job: FilterJob, extracted: Sequence[Extracted], counts: Counts, tests: TestPictures) -> str:
    """Mark `out` as this filter's, or find that it is; returns a name for all that the result depends on.

    Raises:
        UserError: `out` holds files that this filter of these shards would not write.
    """
    digest = hashlib.blake2b(digest_size=8)
    for hashes in (tests.pictures, tests.files):
        digest.update(np.unique(hashes).tobytes() + b"|")
    digest.update((counts.folder / COUNTED).read_bytes())
    digest.update(job.rules.model_dump_json().encode())
    digest.update("|".join(one.name for one in extracted).encode())
    settings = json.dumps({"name": digest.hexdigest(), "rules": job.rules.model_dump(mode="json")}, indent=1) + "\n"
    marker = job.out / SETTINGS
    if marker.is_file() and marker.read_bytes() == settings.encode():
        return digest.hexdigest()
    job.out.mkdir(parents=True, exist_ok=True)
    if _entries(job):
        raise UserError(f"--out: {job.out} holds the result of another filter; name a new folder")
    write_text(marker, settings)
    return digest.hexdigest()


def _write_list(lists: Sequence[Path], target: Path) -> None:
    aside = target.with_name(f".{target.name}.partial")
    pl.scan_parquet(list(lists)).sink_parquet(aside, engine="streaming")
    flush_to_disk(aside)
    aside.replace(target)
