"""Values and names of metrics in the precision and the words that a reader wants."""

import math

from vlm.metric import Metric

_LOWER_IS_BETTER = "↓"
LOWER_NOTE = f"{_LOWER_IS_BETTER}: lower is better"


def marked(words: str, metric: Metric) -> str:
    """The words for a metric, with an arrow where lower values are better."""
    return f"{words} {_LOWER_IS_BETTER}" if metric.better == "lower" else words


def formatted(metric: Metric, value: float) -> str:
    """A metric's value: fractions in percent, counts with separators, the rest with four digits."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if metric.unit == "fraction":
        return f"{100 * value:.1f}%"
    return f"{value:,.0f}" if metric.unit == "count" else four_digits(value)


def four_digits(value: float) -> str:
    """Four digits, and separators where there are more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
