"""Benchmarks of damage, wrong inputs and ends: `python -P -m benchmarks.robustness [SCRIPT] [ARGUMENTS]`."""

from benchmarks.catalogue import start

if __name__ == "__main__":
    start("robustness")
