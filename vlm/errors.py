"""Errors that a user can cause: each ends in one clear line and exit code 2, never in a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend; its text names the file, key or value and the nearest valid choice."""


class EveryRankError(UserError):
    """A user's error that every rank raises alike: it is told once."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Words that end an error line: the valid choices nearest to `name`, or all of them when none is near."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(close)
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return "choose from: " + shown if known else "there are none"


def reason(error: BaseException) -> str:
    """Another library's exception in one short line, to end a UserError with."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
