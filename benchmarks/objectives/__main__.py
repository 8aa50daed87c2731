"""Benchmarks of objectives against each other: `python -P -m benchmarks.objectives [SCRIPT] [ARGUMENTS]`."""

from benchmarks.catalogue import start

if __name__ == "__main__":
    start("objectives")
