"""Benchmarks of the geometry of embeddings: `python -P -m benchmarks.geometry [SCRIPT] [ARGUMENTS]`."""

from benchmarks.catalogue import start

if __name__ == "__main__":
    start("geometry")
