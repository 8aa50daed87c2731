"""The check of a set of shards: scans in parallel, one report, its JSON."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from data.check.duplicates import Duplicates, find_duplicates
from data.check.histogram import Distribution, Histogram
from data.check.scan import DISTRIBUTIONS, OF_DOCUMENTS, ScanJob, ShardScan, scan_shard
from data.pools.base import Workers
from data.pools.local import open_pool
from vlm.config import Config
from vlm.paths import write_output

_THOUSANDTHS = "_thousandths"


class CheckConfig(Config):
    """The options of a check: which hashes count as the same picture, and how much is named rather than counted."""

    distance_bits: int = Field(default=4, ge=0, le=16, description="picture hashes that differ in at most so many bits")
    listed: int = Field(
        default=100, ge=0, le=10**9, description="groups, matches and findings of a kind that are named"
    )
    mark: str = Field(
        default="<image>", min_length=1, max_length=100, description="the place of an image in the text of a document"
    )
    clip_tokens: bool = Field(default=True, description="count the CLIP tokens of captions")
    images: bool = Field(
        default=True,
        description="read images; without, texts alone are samples, as to training with data.images: false",
    )


@dataclass(frozen=True)
class ListedProblem:
    """A finding by its place ("" as key: the shard as a whole) and reason."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Problems:
    """The count of one kind of problem, and the first of them."""

    count: int
    listed: tuple[ListedProblem, ...]


@dataclass(frozen=True)
class CheckReport:
    """All that was found. `bytes` are those of the (unpacked) tars; `bad_share` is `bad_samples` of `entries`.

    Where no `images` were read, nothing is known of them. Entries are the samples and what was refused or lost beside
    them: unsafe members by key, damaged and unreadable shards as one each. Distributions have their unit in their name.
    """

    shards: int
    images: bool
    samples: int
    entries: int
    bad_samples: int
    bad_share: float
    bytes: int
    suffixes: dict[str, int]
    formats: dict[str, int]
    modes: dict[str, int]
    distributions: dict[str, Distribution]
    problems: dict[str, Problems]
    duplicates: Duplicates

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write the JSON file, whole or not at all. Raises UserError where it cannot be written."""
        write_output(path, json.dumps(self.to_json(), indent=1, ensure_ascii=True) + "\n", "--json")


def check_shards(
    shards: Sequence[str],
    config: CheckConfig,
    *,
    against: Sequence[str] = (),
    workers: Workers = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[CheckReport, dict[str, Histogram]]:
    """Read all shards once, in `workers` processes (default: one a core): the report, and the full histograms.

    `against` are shards whose pictures should not be among them. `progress` gets each shard's number of samples.
    Memory grows by 8 bytes a sample and 24 a picture, whatever they hold; the report does not depend on `workers`.
    """
    options = {"clip_tokens": config.clip_tokens, "images": config.images}
    jobs = [ScanJob(shard, **options, listed=config.listed, mark=config.mark) for shard in shards]
    others = [ScanJob(shard, texts=False, listed=0) for shard in against]
    scans = []
    with open_pool(workers) as pool:
        for scan in pool.in_order(scan_shard, [*jobs, *others]):
            scans.append(scan)
            if progress is not None:
                progress(scan.num_samples)
    set_scans, against_scans = scans[: len(jobs)], scans[len(jobs) :]
    histograms = _histograms(set_scans)
    return _report(set_scans, against_scans, histograms, config), histograms


def _report(
    scans: Sequence[ShardScan], against: Sequence[ShardScan], histograms: dict[str, Histogram], config: CheckConfig
) -> CheckReport:
    entries, bad = sum(scan.num_entries for scan in scans), sum(scan.num_bad for scan in scans)
    return CheckReport(
        shards=len(scans),
        images=config.images,
        samples=sum(scan.num_samples for scan in scans),
        entries=entries,
        bad_samples=bad,
        bad_share=bad / entries if entries else 0.0,
        bytes=sum(scan.num_bytes for scan in scans),
        suffixes=_tally(scan.tallies["suffixes"] for scan in scans),
        formats=_tally(scan.tallies["formats"] for scan in scans),
        modes=_tally(scan.tallies["modes"] for scan in scans),
        distributions=_distributions(histograms),
        problems=_problems(scans, config.listed),
        duplicates=find_duplicates(scans, against, distance_bits=config.distance_bits, listed=config.listed),
    )


def _tally(counters: Iterable[Counter[str]]) -> dict[str, int]:
    """Most frequent first."""
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _histograms(scans: Sequence[ShardScan]) -> dict[str, Histogram]:
    together = {name: Histogram() for name in DISTRIBUTIONS}
    for scan in scans:
        for name, histogram in scan.histograms.items():
            together[name].add(histogram)
    return together


def _distributions(histograms: dict[str, Histogram]) -> dict[str, Distribution]:
    return {
        name.removesuffix(_THOUSANDTHS): histogram.describe(1000 if name.endswith(_THOUSANDTHS) else 1)
        for name, histogram in histograms.items()
        if name != OF_DOCUMENTS or histogram.describe().count
    }


def _problems(scans: Sequence[ShardScan], listed: int) -> dict[str, Problems]:
    counts = _tally(scan.num_findings for scan in scans)
    examples: dict[str, list[ListedProblem]] = {kind: [] for kind in counts}
    for scan in scans:
        for finding in scan.findings:
            if len(examples[finding.kind]) < listed:
                examples[finding.kind].append(ListedProblem(scan.shard, finding.key, finding.reason))
    return {kind: Problems(count, tuple(examples[kind])) for kind, count in counts.items()}
