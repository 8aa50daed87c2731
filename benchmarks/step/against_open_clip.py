"""A training step beside open_clip's: forward, loss, backward, clipping and update in bf16.

    python -P -m benchmarks.step.against_open_clip [--work WORK] [--turns 5] [--captions 'SHARDS'] [--models small b32]

open_clip: its model, `ClipLoss` and step (autocast, clipping at 1, AdamW by its script's groups, the scale's bound), of
pixels that are normalised beforehand. vlm: `train_step` with a recipe's defaults, of 8-bit pixels; and the same with
one thing switched off. All ways take turns in one process, another one first in each, with the same batches. Memory:
what a fresh process's peak rises in a step above its model and moments. Captions are those of `SHARDS` (webdataset),
and token counts as the web's: log-normal, mean 16.6, at most 75.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import apart, peak_above
from benchmarks.result_cache import ResultCache, machine
from benchmarks.step.systems import MODELS, Own, Peer, batches
from vlm.batch import Batch
from vlm.training.optimizers.adamw import AdamW


class PlainAdamW(AdamW):
    """AdamW as open_clip makes it."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps)


PEER, OWN = "open_clip", "vlm"
OFF: Mapping[str, dict[str, Any]] = {
    OWN: {},
    "vlm, texts padded to the longest": {"group_texts": False},
    "vlm, fused attention": {"attention": "fused"},
    "vlm, products of pairs in fp32": {"similarity": {"product": "fp32"}},
    "vlm, AdamW not fused": {"optimizer": PlainAdamW()},
}
Step = Callable[[Batch], float]


def make_step(way: str, name: str) -> Step:
    """A model with the step of a way."""
    return Peer(name) if way == PEER else Own(name, OFF[way])


def measure_times(asked: tuple[str, str | None, int, list[str]]) -> dict[str, list[float]]:
    """Each way's times, turn by turn, after one that is not counted."""
    name, captions, turns, ways = asked
    steps = {way: make_step(way, name) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn, batch in zip(range(turns + 1), batches(name, captions), strict=False):
        first = turn % len(ways)
        for way in (*ways[first:], *ways[:first]):
            took = steps[way](batch)
            if turn:
                times[way].append(took)
    return times


def measure_peak(asked: tuple[str, str | None, str]) -> float:
    """By how many MB a step raises this process's peak, with moments made before."""
    name, captions, way = asked
    step, several = make_step(way, name), batches(name, captions)
    step(next(several))
    return peak_above(lambda: step(next(several)))


def shown(times: Mapping[str, list[float]], peaks: Mapping[str, float], title: str, captions: str) -> None:
    """Print a table."""
    print(f"\n{title}; captions {captions}\n")
    print("| step | s, median (least to most) | open_clip's / its | vlm's / its | peak MB |\n|---|---|---|---|---|")
    medians = {way: statistics.median(found) for way, found in times.items()}
    for way, found in times.items():
        peak = f"{peaks[way]:.0f}" if way in peaks else ""
        ratios = f"{medians[PEER] / medians[way]:.2f} | {medians[OWN] / medians[way]:.2f}"
        print(f"| {way} | {medians[way]:.3f} ({min(found):.3f} to {max(found):.3f}) | {ratios} | {peak} |")


def main() -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--captions", help="shards whose captions are taken too, beside those as the web's")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=[PEER, *OFF], default=[PEER, *OFF])
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured")
    parser.add_argument("--ask", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask:
        functions: dict[str, Callable[[Any], Any]] = {"times": measure_times, "peak": measure_peak}
        print(json.dumps(functions[arguments.ask[0]](arguments.ask[1])))
        return
    results = ResultCache(arguments.work, "step", arguments.again)
    ask = partial(apart, "benchmarks.step.against_open_clip")
    kinds = {"as the web's": None} | ({"of the shards": arguments.captions} if arguments.captions else {})
    print(machine())
    for name in arguments.models:
        for words, captions in kinds.items():
            asked = (name, captions, arguments.turns, arguments.ways)
            times = results(f"times {name}, captions {words}, {arguments.turns}", partial(ask, "times", asked))
            peaks = {
                way: results(f"peak {name}, captions {words}, {way}", partial(ask, "peak", (name, captions, way)))
                for way in (PEER, OWN)
            }
            shown(times, peaks, MODELS[name][0], words)


if __name__ == "__main__":
    main()
