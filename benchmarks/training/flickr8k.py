"""A run of `flickr8k-tiny` on real photographs: its retrieval table, its throughput and its curves.

    python -P -m benchmarks.training.flickr8k DATA_FOLDER [--run RUN] [--figure FILE.png]

A finished run is kept, and an unfinished one goes on: started again, the script prints the same table.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECALLS = ("r@1", "r@5", "r@10", "median_rank")


def curves(lines: list[dict[str, Any]], figure: Path) -> None:
    """Draw the loss, and R@10 on the validation images, against samples seen."""
    losses = [(line["samples"], line["loss"]) for line in lines if "loss" in line]
    recalls = {
        way: [(line["samples"], line[f"eval/val/{way}_r@10"]) for line in lines if f"eval/val/{way}_r@10" in line]
        for way in ("image_to_text", "text_to_image")
    }
    chart, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(*zip(*losses, strict=True), linewidth=1)
    left.set(title="loss", xlabel="samples")
    for way, points in recalls.items():
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=way.replace("_", " "))
    right.set(title="R@10, 1,000 validation images", xlabel="samples", ylim=(0, None))
    right.legend(frameon=False)
    chart.savefig(figure, dpi=110)


def main() -> None:
    """Train where needed, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--run", type=Path, default=Path("runs/flickr8k-tiny"))
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("flickr8k.png"))
    arguments = parser.parse_args()
    command = [str(Path(sys.executable).with_name("vlm")), "train", "flickr8k-tiny", "--resume", "auto"]
    subprocess.run([*command, f"data.root={arguments.data}", f"run={arguments.run}"], check=True)
    lines = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for line in lines for key, value in line.items()}
    print("| 1,000 test images | R@1 | R@5 | R@10 | median rank |\n|---|---|---|---|---|")
    for way in ("image_to_text", "text_to_image"):
        cells = [last[f"eval/test/{way}_{name}"] for name in RECALLS]
        print(f"| {way.replace('_', ' ')} | {cells[0]:.2%} | {cells[1]:.2%} | {cells[2]:.2%} | {cells[3]:g} |")
    rates = [line["samples_per_second"] for line in lines if "loss" in line][1:]
    waits = [line["data_wait"] for line in lines if "loss" in line][1:]
    quarters = statistics.quantiles(rates, n=4)
    print(f"samples/s: median {quarters[1]:.0f}, quartiles {quarters[0]:.0f} to {quarters[2]:.0f}")
    print(f"share of the time spent waiting for data: median {statistics.median(waits):.3f}")
    curves(lines, arguments.figure)


if __name__ == "__main__":
    main()
