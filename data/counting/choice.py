"""The choice among all samples that were judged, and step 3: small numbers made as rare as the largest ones."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data.convert.on_ranks import LeftOut
from data.counterfactuals.numbers import WORDS
from data.counting.judge import Agreed, Part
from data.counting.named import Outcome
from data.counting.source import CountSource
from data.counting.tally import SAMPLES, UNKNOWN, Tally, add, merged
from data.randomness import hash_key

SMALL: Final = range(2, 7)
LARGE: Final = range(7, 11)


@dataclass(frozen=True)
class Choice:
    """The samples that are kept, by the number of their shard, in its order; and what became of all others.

    `most` is how many of each small number are kept (None: all). `unknown` are the entries of the detections that name
    no sample, `left_out` what cannot be used, with the number of its shard. `nothing_known`: the detections say
    nothing of any sample. `detected` has the key of each sample that was looked at, and the counts of its classes.
    """

    kept: dict[int, tuple[Agreed, ...]]
    tally: Tally
    most: int | None
    unknown: tuple[int, ...]
    left_out: tuple[tuple[int, LeftOut], ...]
    nothing_known: bool
    detected: tuple[tuple[str, dict[str, int]], ...]


def choose(parts: Sequence[Part], names: Sequence[str], source: CountSource, seed: int, most: int | None) -> Choice:
    """The choice; `names` are those of the shards' copies, by the shards' numbers.

    Which samples of a small number stay is drawn by hashes of seed, shard's file name and key: it depends neither on
    ranks nor on any order, and a smaller choice lies within a larger one. An entry of the detections that names several
    samples is of none of them.
    """
    tally = merged(part.tally for part in parts)
    matched = Counter(entry for part in parts for entry in part.matched)
    agreed: dict[int, list[tuple[int, Agreed]]] = {}
    for part in parts:
        for one in part.agreed:
            if one.entry is not None and matched[one.entry] > 1:
                add(tally, WORDS[one.number], Outcome.SHARED_KEY)
            else:
                agreed.setdefault(one.number, []).append((part.shard, one))
    most = _most_of_small({number: len(ones) for number, ones in agreed.items()}, most)
    kept: dict[int, list[Agreed]] = {}
    for number, ones in agreed.items():
        stay = _drawn(ones, names, seed, most) if number in SMALL and most is not None else ones
        add(tally, WORDS[number], Outcome.KEPT, len(stay))
        add(tally, WORDS[number], Outcome.BALANCE, len(ones) - len(stay))
        for shard, one in stay:
            kept.setdefault(shard, []).append(one)
    return Choice(
        kept={shard: tuple(sorted(ones, key=lambda one: one.position)) for shard, ones in kept.items()},
        tally=tally,
        most=most,
        unknown=tuple(entry for entry in range(len(source.names)) if entry not in matched),
        left_out=tuple((part.shard, one) for part in _in_order(parts) for one in part.left_out),
        nothing_known=not matched and (bool(source.names) or _is_unknown(tally)),
        detected=tuple(one for part in _in_order(parts) for one in part.detected),
    )


def _most_of_small(numbers: Mapping[int, int], most: int | None) -> int | None:
    """As asked for, else as many as the most frequent large number has; None where there is none to go by."""
    return most if most is not None else max(numbers.get(number, 0) for number in LARGE) or None


def _drawn(
    ones: Sequence[tuple[int, Agreed]], names: Sequence[str], seed: int, most: int
) -> Sequence[tuple[int, Agreed]]:
    def place(entry: tuple[int, Agreed]) -> tuple[bytes, str, int]:
        shard, one = entry
        return hash_key("counting set", seed, Path(names[shard]).name, one.key), names[shard], one.position

    return sorted(ones, key=place)[:most]


def _is_unknown(tally: Tally) -> bool:
    """Whether there are samples with a number, and nothing is known of any."""
    samples, unknown = (sum(of.get(name, 0) for word, of in tally.items() if word) for name in (SAMPLES, UNKNOWN))
    return 0 < samples == unknown


def _in_order(parts: Sequence[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: (part.shard, part.part))
