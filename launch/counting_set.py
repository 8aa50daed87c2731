"""`vlm data counting`: captions whose number the picture shows, on all ranks that a launcher started."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Column, Table

from data.convert.on_ranks import require_other_files, require_same_shards
from data.counting.detected import DetectorCounts
from data.counting.detections import KEY, read_detections
from data.counting.folder import DETECTIONS, JOURNAL, LEDGER, REPORT, CountingFolder, write_counting_set
from data.counting.report import OF_NUMBERS, CountingReport
from data.counting.source import CaptionsOnly, CountSource, FieldCounts
from data.filter.names import output_names
from data.shards.patterns import expand_shards, require_no_command
from launch.counting_options import BalanceOptions, DetectionOptions
from launch.evaluate import PATIENCE, print_left_out
from launch.shown_progress import shown_progress
from vlm.distributed.world import World
from vlm.ends.ranks import Patience
from vlm.errors import EveryRankError
from vlm.model.detector import load_detector, require_folder
from vlm.paths import local_path, output_file, output_folder, shown, write_output
from vlm.progress import report_progress
from vlm.terminal import Terminal, one_line
from vlm.training.engines.base import EngineSettings
from vlm.training.together import ranks_together


def make_counting_set(
    patterns: Sequence[str], detection: DetectionOptions, balance: BalanceOptions, json_file: Path | None = None
) -> CountingReport:
    """Write the counting set of some shards and print what became of each number's samples.

    The same command goes on after a kill. What cannot be used is named on standard error, and all of it in the folder's
    ledger. Raises UserError for what cannot be done.
    """
    detection.require_possible()
    json_file = None if json_file is None else output_file(json_file, "--json")
    names = output_names(sorted(expand_shards(patterns, None, "SHARDS")))
    require_no_command(tuple(names), "SHARDS")
    out = output_folder(balance.out, "--out", files=(JOURNAL, LEDGER, REPORT, DETECTIONS))
    require_other_files(names, out)
    counts = _source_of(detection)
    together = ranks_together(EngineSettings("ddp", rows_per_rank=1), patience=Patience(PATIENCE, "--patience"))
    with together as (accelerator, _):
        world = World.current(accelerator.device)
        require_same_shards(tuple(names.values()), world)
        folder = CountingFolder(names, out, counts(world), balance.seed, balance.most_per_number)
        _require_same_plan(folder, world)
        with shown_progress(is_main=world.is_main):
            report, left_out = write_counting_set(folder, world, report_progress)
        if world.is_main:
            if json_file is not None:
                write_output(json_file, json.dumps(asdict(report), indent=1) + "\n", "--json")
            print_left_out(folder.shards, left_out, out / LEDGER)
            _print(report, out)
        world.barrier()
    return report


def _require_same_plan(folder: CountingFolder, world: World) -> None:
    """Raise EveryRankError where a machine has other detections, or another detector. Collective."""
    first, *others = world.gather_objects(folder.plan())
    for rank, other in enumerate(others, start=1):
        different = [name for name in first if other.get(name) != first[name]]
        if different:
            raise EveryRankError(f"rank {rank} has another {different[0]} than rank 0: every machine needs the same")


def _source_of(options: DetectionOptions) -> Callable[[World], CountSource]:
    """The source of counts, once the ranks are there. Raises UserError before they are, where it cannot be read."""
    if options.detector is not None:
        detector = local_path(options.detector_folder, "--detector")
        require_folder(detector, "--detector")
        return lambda world: DetectorCounts(
            load_detector(detector, "--detector", world.device), options.score, options.batch
        )
    source = _source_without_model(options)
    return lambda _world: source


def _source_without_model(options: DetectionOptions) -> CountSource:
    if options.captions_only:
        return CaptionsOnly()
    if options.in_json is not None:
        return FieldCounts(options.in_json)
    file = local_path(options.detections or "", "--detections")
    return read_detections(file, KEY if options.join is None else options.join, options.score)


def _print(report: CountingReport, out: Path) -> None:
    console = Terminal()
    if report.unknown_names:
        names = ", ".join(shown(name) for name in report.first_unknown_names)
        more = ", ..." if report.unknown_names > len(report.first_unknown_names) else ""
        print(one_line(f"detections that name unknown keys: {report.unknown_names:,} ({names}{more})"), file=sys.stderr)
    table = Table("", *(Column(number, justify="right") for number in report.numbers), title="Counting set")
    for row in map(str, OF_NUMBERS):
        table.add_row(row, *(f"{counts[row]:,}" for counts in report.numbers.values()))
    console.print(table)
    console.print(
        f"of {report.samples:,} samples: "
        + ", ".join(f"{count:,} {words}" for words, count in report.without_number.items())
        + f"; {report.kept:,} kept in {report.shards_written:,} shards",
        soft_wrap=True,
    )
    console.print(_balance_words(report), soft_wrap=True)
    console.print(f"counting set: {out}", soft_wrap=True)


def _balance_words(report: CountingReport) -> str:
    if report.kept_at_most is None:
        return "all of 2 to 6 are kept, as there is none of 7 to 10 to go by; --most-per-number sets a limit"
    by = "--most-per-number" if report.options["most_per_number"] is not None else "the most frequent of 7 to 10"
    return f"at most {report.kept_at_most:,} of each of 2 to 6 are kept, by {by}"
