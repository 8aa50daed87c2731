"""A sample that could not be used, as a ledger names it. Imports nothing heavy: an index tells of such samples too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Skip:
    """One sample that could not be used, and the one that took its place."""

    source: str
    shard: str
    key: str
    reason: str
    substitute: str
