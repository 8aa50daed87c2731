"""Cost of watching the geometry of embeddings in a real run: the share of its time at the default settings.

    python -P -m benchmarks.geometry.telemetry [--steps 200]

Renders some scenes, trains the demo's recipe on them for a few steps, evaluations left out, with an observation every
tenth step, and times each: sampling the pairs from the global batch, all figures, writing them down. The share is what
an observation takes against the 100 steps that lie between two by default. Widths are tried apart from training, on
random pairs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize

from benchmarks.result_cache import machine
from launch.recipe import load_recipe
from launch.scenes import render_scenes
from launch.train import train
from vlm.geometry.telemetry import PairSample, TelemetryConfig, observe
from vlm.training.hooks.geometry import GeometryTelemetry

EVERY = 10
BETWEEN = 100  # steps, by default
WIDTHS = (128, 512, 1024)


def in_a_run(num_steps: int) -> tuple[list[float], float]:
    """Seconds of each observation, and seconds a step of all the rest (both without the first tenth)."""
    observations: list[tuple[float, float]] = []
    whole = GeometryTelemetry.observe

    def timed(*arguments: object, **options: object) -> None:
        began = time.perf_counter()
        whole(*arguments, **options)  # type: ignore[arg-type]
        observations.append((began, time.perf_counter() - began))

    with tempfile.TemporaryDirectory() as folder:
        scenes = Path(folder) / "scenes"
        render_scenes(scenes, train=4000, val=100, seed=0, image_size=64)
        options = [
            f"data.root={scenes}",
            f"run={folder}/run",
            f"duration={num_steps} steps",
            f"geometry.every={EVERY} steps",
            "evaluate={}",
            "trackers=[tensorboard]",
        ]
        GeometryTelemetry.observe = timed  # type: ignore[method-assign]
        try:
            train(load_recipe("scenes", options))
        finally:
            GeometryTelemetry.observe = whole  # type: ignore[method-assign]
    kept = observations[len(observations) // 10 :]
    watched = [seconds for _, seconds in kept]
    steps = (len(kept) - 1) * EVERY
    passed = kept[-1][0] - kept[0][0] - sum(watched[:-1])
    return watched, passed / steps


def alone(dim: int, size: int) -> float:
    """Median seconds of all figures of random pairs of this width."""
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(size, dim, generator=generator), dim=1) for _ in range(2))
    took = []
    for _ in range(7):
        began = time.perf_counter()
        observe(PairSample(image, text), 14.3)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    print("training", file=sys.stderr)
    watched, step = in_a_run(arguments.steps)
    median = statistics.median(watched)
    print(f"{machine()}\n")
    print("| the demo's run, global batch 128, all 128 pairs of 128 dimensions looked at | measured |\n|---|---|")
    print(f"| a step | {1e3 * step:.0f} ms |")
    print(f"| an observation, written down: median (most) | {1e3 * median:.1f} ms ({1e3 * max(watched):.1f}) |")
    print(f"| share of the run at one in {BETWEEN} steps | {median / (BETWEEN * step):.3%} |")
    size = TelemetryConfig().sample
    print(f"\n| figures of {size} pairs alone, dimensions | ms |\n|---|---|")
    for dim in WIDTHS:
        print(f"| {dim} | {1e3 * alone(dim, size):.1f} |")


if __name__ == "__main__":
    main()
