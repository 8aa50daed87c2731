"""Findings on what a run needs: ok, a warning, or what would fail, each with its remedy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vlm.terminal import one_line

State = Literal["ok", "warn", "fail"]
_ORDER: tuple[State, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """What was found of one thing: in words, with a remedy where it is not ok."""

    check: str
    state: State
    words: str
    fix: str = ""

    @property
    def line(self) -> str:
        """The finding as it is printed."""
        remedy = f"; fix: {self.fix}" if self.fix and self.state != "ok" else ""
        return one_line(f"{self.state:<4}  {self.check:<12}  {self.words}{remedy}")


def worst(findings: Iterable[Finding]) -> State:
    """The worst state among findings; ok where there are none."""
    return max((finding.state for finding in findings), key=_ORDER.index, default="ok")


def counted(findings: Sequence[Finding]) -> str:
    """How many findings there are of each state."""
    numbers = [(state, sum(finding.state == state for finding in findings)) for state in _ORDER]
    return ", ".join(f"{number} {state}" for state, number in numbers)
