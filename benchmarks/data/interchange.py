"""Shards by `vlm data build`, read by open_clip's own training pipeline: every sample, every caption.

    python -P -m benchmarks.data.interchange [--folder FOLDER] [--peer-path PATH]

The peer's environment is that of benchmarks.data.throughput.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.data.throughput import peer_path
from benchmarks.processes import Measurer
from benchmarks.result_cache import machine
from data.convert.builder import BuildOptions, build_shards
from data.convert.columns import ColumnOptions
from data.convert.source import BuildSource

SAMPLES, SHARD, BATCH = 240, 40, 24


def caption(number: int) -> str:
    """A caption of words, since the tokenizer takes digits apart."""
    return f"a picture named {''.join(chr(ord('a') + int(digit)) for digit in str(number))}"


def write_table(folder: Path) -> Path:
    """Pictures and a table of them in open_clip's own layout: filepath, title, tabs between."""
    rows = ["filepath\ttitle"]
    for number in range(SAMPLES):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
        rows.append(f"{number}.jpg\t{caption(number)}")
    table = folder / "table.csv"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return table


def main() -> None:
    """Build, let the peer read, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vlm-benchmark")
    parser.add_argument("--peer-path", type=Path, help="folder to import webdataset 0.2 from")
    arguments = parser.parse_args()
    folder = arguments.folder / "interchange"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    source = BuildSource(str(write_table(folder / "pictures")), None, None, ColumnOptions())
    summary = build_shards(source, folder / "shards", BuildOptions(samples_per_shard=SHARD), workers=1)
    with Measurer("benchmarks.data.peer", arguments.peer_path or peer_path(arguments.folder)) as peer:
        read = peer.ask([0], what="captions", folder=str(folder / "shards"), size=32, batch=BATCH, num_samples=SAMPLES)
    expected = {caption(number) for number in range(SAMPLES)}
    same = set(read) == expected and len(read) == SAMPLES
    print(machine())
    print("| shards by vlm data build | samples | read by open_clip | captions |\n|---|---|---|---|")
    told = "all, each once" if same else f"{len(set(read) & expected)} of {SAMPLES}"
    print(f"| {len(summary.shards)} | {summary.num_samples} | {len(read)} | {told} |")


if __name__ == "__main__":
    main()
