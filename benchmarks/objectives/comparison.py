"""Objectives against each other on real photographs: Flickr8k at 64 px, small towers, the same samples for all.

    python -P -m benchmarks.objectives.comparison --data DATA [--work WORK] [--rows ROW ...] [--processes 2] [--search]

Finished runs are kept in WORK, and started again the script goes on with those that are missing. At the end it prints
the table and, with all rows, puts it between its markers in RESULTS.md. Each run uses one thread; `--processes` says
how many are made at once. `--search` tries learning rates and bounds instead, on the validation split, with one seed.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.objectives.photos import Photos, load_photos
from benchmarks.objectives.run import ARCHITECTURE, Run, measure
from benchmarks.objectives.tables import Measured, put_between, search_table, table
from benchmarks.result_cache import ResultCache, machine
from vlm.model.tokenizer import Tokenizer, full_tokenizer

SEEDS = (0, 1, 2)
NUM_SAMPLES = 36_000  # six epochs
SEARCH_SAMPLES = 60_000
SMALL, LARGE = 64, 512
RATES = {SMALL: 5e-4, LARGE: 2e-3}  # of what --search tries for clip; used for all
SEARCHED_RATES = {SMALL: (5e-4, 1e-3, 2e-3), LARGE: (1e-3, 2e-3, 4e-3)}
# Temperatures settle where a sample's softmax over negatives diverges by rho from uniform, which is at most the log of
# their number: the published 8 is beyond that here.
RHO = {SMALL: 3.0, LARGE: 4.0}
SEARCHED_RHO = {SMALL: (1.0, 2.0, 3.0), LARGE: (2.0, 3.0, 4.0)}
QUEUE = 2_048  # of 6,000 photographs


def rows_at(batch: int) -> dict[str, dict[str, Any]]:
    """The rows of the comparison at this batch: the fields of a `Run`."""
    sigmoid_start = {"init_logit_scale": 10.0, "init_logit_bias": -10.0}
    rows: dict[str, dict[str, Any]] = {
        "clip": {"objective": {"clip": 1.0}},
        "sigmoid": {"objective": {"sigmoid": 1.0}, "model": sigmoid_start},
        "decoupled": {"objective": {"decoupled": 1.0}},
        "individual_temperature": _individual(RHO[batch]),
    }
    if batch == LARGE:
        return rows
    # MoCHi's proportions: as many mixtures as hardest negatives, an eighth with the query; from a tenth of the run on.
    mixed = {"hardest": 32, "mixed": 32, "mixed_with_query": 4, "start_step": NUM_SAMPLES // batch // 10}
    remembered = {"clip": 0.5, "momentum_distillation": {"weight": 0.5, "queue_size": QUEUE}}
    return {
        **rows,
        "continuous": {"objective": {"continuous": 1.0}},
        "clip + mixed_negatives": {"objective": {"clip": 1.0}, "providers": {"mixed_negatives": mixed}},
        "clip + queue + momentum_distillation": {"objective": remembered, "providers": {"queue": {"size": QUEUE}}},
    }


def planned(names: list[str]) -> Iterator[Run]:
    """The runs of these rows (all, if none is named), seed by seed."""
    for seed in SEEDS:
        for batch in (SMALL, LARGE):
            for name, fields in rows_at(batch).items():
                if not names or name in names:
                    yield Run(name, batch, seed, RATES[batch], NUM_SAMPLES, "test", **fields)


def searching() -> Iterator[Run]:
    """The runs of the search: learning rates under `clip`, and what no default fits at this size."""
    for batch in (SMALL, LARGE):
        for lr in SEARCHED_RATES[batch]:
            yield Run("clip", batch, SEEDS[0], lr, SEARCH_SAMPLES, "val", **rows_at(batch)["clip"])
        for rho in SEARCHED_RHO[batch]:
            name = f"individual_temperature, rho {rho:g}"
            yield Run(name, batch, SEEDS[0], RATES[batch], SEARCH_SAMPLES, "val", **_individual(rho))


def _individual(rho: float) -> dict[str, Any]:
    """Temperatures begin where the logit scale of the others does."""
    return {"objective": {"individual_temperature": {"temperature_init": 0.07, "rho": rho, "rate": 0.01}}}


@cache
def photos_of(data: Path, work: Path) -> dict[str, Photos]:
    """Flickr8k in this process's memory."""
    tokenizer = Tokenizer(full_tokenizer(ARCHITECTURE["text_cfg"]), shorten=True)
    return load_photos(data, work, tokenizer)


def make(run: Run, data: Path, work: Path) -> Measured:
    """The result of a run: made now, unless it is there."""
    settings = json.dumps(run.settings(), sort_keys=True).encode()
    name = f"{run.name}-{run.split}-{hashlib.blake2b(settings, digest_size=4).hexdigest()}"
    results = ResultCache(work / "runs", name, again=False)
    return Measured(run, results(name, lambda: measure(run, photos_of(data, work))))


def main() -> None:
    """Make what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("VLM_TEST_DATA"), help="folder of flickr8k-*.tar")
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--rows", nargs="+", default=[], choices=list(rows_at(SMALL)))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--search", action="store_true")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data (or VLM_TEST_DATA) must name the folder of flickr8k-*.tar")
    data, work = Path(arguments.data), arguments.work
    photos_of(data, work)
    runs = list(searching() if arguments.search else planned(arguments.rows))
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("forkserver")) as pool:
        measured = list(pool.map(make, runs, [data] * len(runs), [work] * len(runs)))
    if arguments.search:
        print(search_table(measured))
        return
    text = f"{machine()}\n\n{table(measured)}"
    print(text)
    if not arguments.rows:
        put_between("objectives", Path(__file__).with_name("RESULTS.md"), text)


if __name__ == "__main__":
    main()
