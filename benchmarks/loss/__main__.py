"""Benchmarks of the losses, beside open_clip's: `python -P -m benchmarks.loss [SCRIPT] [ARGUMENTS]`."""

from benchmarks.catalogue import start

if __name__ == "__main__":
    start("loss")
