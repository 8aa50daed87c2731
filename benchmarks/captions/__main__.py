"""Benchmarks of captioning: `python -P -m benchmarks.captions [SCRIPT] [ARGUMENTS]`."""

from benchmarks.catalogue import start

if __name__ == "__main__":
    start("captions")
