"""Benchmarks of the training step, beside open_clip's: `python -P -m benchmarks.step [SCRIPT] [ARGUMENTS]`."""

from benchmarks.catalogue import start

if __name__ == "__main__":
    start("step")
