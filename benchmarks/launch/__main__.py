"""Benchmarks of starting and surviving: `python -P -m benchmarks.launch [SCRIPT] [ARGUMENTS]`."""

from benchmarks.catalogue import start

if __name__ == "__main__":
    start("launch")
