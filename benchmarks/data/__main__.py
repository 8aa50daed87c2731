"""Benchmarks of the data path and of the order of samples: `python -P -m benchmarks.data [SCRIPT] [ARGUMENTS]`."""

from benchmarks.catalogue import start

if __name__ == "__main__":
    start("data")
