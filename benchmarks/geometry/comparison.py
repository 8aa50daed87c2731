"""Objectives and the gap between images and texts: small towers on Flickr8k and rendered scenes, the same samples.

    python -P -m benchmarks.geometry.comparison --data DATA [--work WORK] [--processes 2]

Trains from scratch, goes on from the `clip` runs as the paper fine-tunes (Fahim et al., 2024), and trains the control
of two image towers. Finished runs are kept in WORK, and started again the script goes on with those that are missing.
At the end it prints the tables, puts them into RESULTS.md and draws geometry.png. Runs use one thread; `--processes`
says how many are made at once.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.geometry.figure import draw
from benchmarks.geometry.pictures import Pictures, load_pictures
from benchmarks.geometry.run import GeometryRun, measure
from benchmarks.geometry.tables import GeometryResult, TwinsResult, tables
from benchmarks.geometry.twins import Start, Twins, measure_twins
from benchmarks.objectives.run import ARCHITECTURE
from benchmarks.objectives.tables import put_between
from benchmarks.result_cache import ResultCache, machine
from vlm.model.tokenizer import Tokenizer, full_tokenizer
from vlm.objectives.presets import PRESETS

SEEDS = (0, 1, 2)
BATCH = 64
RATE, NUM_SAMPLES = 1e-3, 96_000  # eight epochs; of 5e-4 and 1e-3 the better for clip, seed 0, 60,000 samples
TUNING_RATE, TUNING_SAMPLES = 1e-4, 18_000
TWIN_SAMPLES = 24_000
FIXED = {"init_logit_scale": 100.0, "learn_logit_scale": False}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": {"clip": 1.0},
    "+ uniformity + alignment": dict(PRESETS["gap-cua"]),
    "+ cross uniformity too": dict(PRESETS["gap-cuaxu"]),
}
# Other ways to shape the clouds, with a learned temperature alone.
OTHERS: dict[str, dict[str, Any]] = {
    "+ cyclic": {"clip": 1.0, "cyclic": 1.0},
    "+ cross-correlation": {"clip": 1.0, "cross_correlation": 1.0},
    "+ whitening": {"clip": 1.0, "whitening": 1.0},
}
STARTS: tuple[Start, ...] = ("other weights", "same weights")


def from_scratch() -> Iterator[GeometryRun]:
    """The paper's objectives with a learned and with its fixed temperature, then the others, seed by seed."""
    for seed in SEEDS:
        for temperature, model, objectives in (
            ("learned", {}, OBJECTIVES),
            ("0.01", FIXED, OBJECTIVES),
            ("learned", {}, OTHERS),
        ):
            for name, objective in objectives.items():
                row, base = f"{name}, {temperature}", f"clip, {temperature}"
                if name == "clip":
                    base = "" if temperature == "learned" else "clip, learned"
                yield GeometryRun(row, BATCH, seed, RATE, NUM_SAMPLES, "test", objective, model=model, base=base)


def fine_tuning(starts: dict[int, str]) -> Iterator[GeometryRun]:
    """Each objective at the paper's temperature, from the `clip` run of the seed."""
    for seed, start in starts.items():
        for name, objective in OBJECTIVES.items():
            row, base = f"tuned: {name}, 0.01", "clip, learned" if name == "clip" else "tuned: clip, 0.01"
            yield GeometryRun(
                row, BATCH, seed, TUNING_RATE, TUNING_SAMPLES, "test", objective, model=FIXED, start=start, base=base
            )


def key_of(settings: dict[str, Any], name: str) -> str:
    """A file name that no other settings have."""
    return f"{name}-{hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()}"


@cache
def pictures_of(data: Path, work: Path) -> Pictures:
    """All pictures in this process's memory."""
    tokenizer = Tokenizer(full_tokenizer(ARCHITECTURE["text_cfg"]), shorten=True)
    return load_pictures(data, work, tokenizer)


def make(run: GeometryRun, data: Path, work: Path) -> GeometryResult:
    """The result of a run: made now, unless it is there."""
    key = key_of(run.settings(), run.name.replace(":", "").replace(",", "-"))
    found = ResultCache(work / "runs", key, again=False)(key, lambda: measure(run, pictures_of(data, work), work, key))
    return GeometryResult(run, key, found)


def make_twins(twins: Twins, data: Path, work: Path) -> TwinsResult:
    """The result of a control: made now, unless it is there."""
    key = key_of(asdict(twins), f"twins-{twins.start.replace(' ', '-')}-{twins.seed}")
    return TwinsResult(
        twins, ResultCache(work / "runs", key, again=False)(key, lambda: measure_twins(twins, pictures_of(data, work)))
    )


def main() -> None:
    """Make what is missing, then print, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("VLM_TEST_DATA"), help="folder of flickr8k-*.tar")
    parser.add_argument("--work", type=Path, default=Path("runs/geometry"))
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data (or VLM_TEST_DATA) must name the folder of flickr8k-*.tar")
    data, work = Path(arguments.data), arguments.work
    pictures_of(data, work)
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("forkserver")) as pool:

        def all_of(function: Callable[..., Any], settings: list[Any]) -> list[Any]:
            return list(pool.map(function, settings, [data] * len(settings), [work] * len(settings)))

        scratch: list[GeometryResult] = all_of(make, list(from_scratch()))
        starts = {done.run.seed: done.key for done in scratch if done.run.row == "clip, learned"}
        tuned: list[GeometryResult] = all_of(make, list(fine_tuning(starts)))
        controls = [Twins(start, seed, RATE / 2, TWIN_SAMPLES) for start in STARTS for seed in SEEDS]
        twins: list[TwinsResult] = all_of(make_twins, controls)
    text = f"{machine()}\n\n{tables(scratch + tuned, twins, work)}"
    print(text)
    draw(scratch + tuned, work, Path(__file__).with_name("geometry.png"))
    put_between("geometry", Path(__file__).with_name("RESULTS.md"), text)


if __name__ == "__main__":
    main()
