"""Cost of the guard against steps without a finite loss: in a step, and where a checkpoint is written.

    python -P -m benchmarks.robustness.guard [--turns 5]

A step pays for one choice at the scalar loss (the gradient's norm is read anyway, now before the update); a checkpoint
for one comparison of all its numbers, beside the SHA-256 that it has to compute. Processor time on one thread.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.result_cache import machine
from vlm.atomic import sha256
from vlm.checkpoint.writer import _require_numbers
from vlm.tensor_file import save_tensors
from vlm.training.accumulation import _nan_unless_finite

STEPS = 2_000
NUMBERS = 100_000_000  # 400 MB: weights and moments of a ViT-B/32's third


def seconds(work: Callable[[], object], turns: int) -> float:
    """The least processor time of some turns."""
    taken = []
    for _ in range(turns):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def losses(checked: bool) -> None:
    loss = torch.ones((), requires_grad=True)
    for _ in range(STEPS):
        value = 1.0 * loss
        (_nan_unless_finite(value) if checked else value).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    print(machine())
    plain, checked = seconds(lambda: losses(False), turns), seconds(lambda: losses(True), turns)
    print(f"a step: {(checked - plain) / STEPS * 1e6:.0f} microseconds")
    tensors = {"weights": torch.randn(NUMBERS)}
    file = Path(tempfile.gettempdir()) / "vlm-guard.safetensors"
    try:
        save_tensors(file, tensors)
        compare = seconds(lambda: _require_numbers("weights", tensors), turns)
        digest = seconds(lambda: sha256(file), turns)
    finally:
        file.unlink(missing_ok=True)
    print(f"400 MB of a checkpoint: {compare:.3f} s to compare, {digest:.3f} s for its SHA-256")


if __name__ == "__main__":
    main()
