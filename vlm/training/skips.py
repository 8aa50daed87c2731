"""Samples that could not be used: counted by reason, told once for all ranks, and too many of them refused."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.skip import Skip

# A share of fewer samples than this says little: with the default of 1 %, ten bad samples are always let pass.
_LEAST_JUDGED = 1_000
_SHOWN = 3


def check_bad_fraction(reasons: Mapping[str, int], num_samples: int, max_bad_share: float) -> None:
    """Raise EveryRankError, naming the commonest reasons, when too large a share of `num_samples` could not be used."""
    bad = sum(reasons.values())
    if bad <= max_bad_share * max(num_samples, _LEAST_JUDGED):
        return
    commonest = Counter(reasons).most_common(_SHOWN)
    shown = "; ".join(f"{count:,} x {reason}" for reason, count in commonest)
    more = f"; and {len(reasons) - _SHOWN} other reasons" if len(reasons) > _SHOWN else ""
    raise EveryRankError(
        f"data.max_bad_share: {bad:,} of {num_samples:,} samples could not be used, more than {max_bad_share:.2%} "
        f"({shown}{more}); the run's ledger.jsonl names each"
    )


def skips_of_all_ranks(skips: Sequence[Skip], source: str, world: World) -> list[Skip]:
    """The samples that any rank could not use, each once, under the name `source`, in one order. Collective."""
    by_place = {(skip.shard, skip.key): skip for rank in world.gather_objects(list(skips)) for skip in rank}
    return [replace(by_place[place], source=source) for place in sorted(by_place)]


def reasons_of(skips: Sequence[Skip]) -> Counter[str]:
    """How often each source gives each reason."""
    return Counter(f"{skip.source}: {skip.reason}" for skip in skips)
