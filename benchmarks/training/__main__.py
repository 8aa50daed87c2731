"""Benchmarks of the training step and of whole runs: `python -P -m benchmarks.training [SCRIPT] [ARGUMENTS]`."""

from benchmarks.catalogue import start

if __name__ == "__main__":
    start("training")
