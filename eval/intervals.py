"""Intervals of shares."""

import math

_95 = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share of independent trials, of which there is one at least (Wilson, 1927)."""
    share, spread = hits / trials, _95**2 / trials
    middle = share + spread / 2
    half = _95 * math.sqrt((share * (1 - share) + spread / 4) / trials)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))
