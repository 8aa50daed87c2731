"""Benchmarks of counting and hard negatives: `python -P -m benchmarks.counting [SCRIPT] [ARGUMENTS]`."""

from benchmarks.catalogue import start

if __name__ == "__main__":
    start("counting")
