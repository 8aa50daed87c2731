"""Parts that go wrong in the ways that a part on a GPU may."""

import os
import sys
import time


def answer(number: int) -> int:
    return number


def fail() -> None:
    raise ValueError("an illegal memory access\nand more")


def hang() -> None:
    time.sleep(600)


def end() -> None:
    sys.stderr.write("out of luck\n")
    sys.stderr.flush()
    os._exit(3)
