"""Names and values of metrics, in the words and the precision that a reader wants."""

import math
import re

_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class_recall": "mean per-class recall",
    "num_samples": "samples",
    "num_images": "images",
    "num_texts": "captions",
    "num_skipped": "skipped samples",
}

# A word of these in a metric's name says that less of it is better.
_BETTER_LOW = {"rank", "loss", "error", "mae", "mse", "rmse", "ece", "brier", "nll", "perplexity", "distance", "fid"}

# What describes the geometry of embeddings: neither more nor less of it is better in itself.
_DESCRIPTIONS = (
    "alignment",
    "uniformity",
    "centroid",
    "distribution_gap",
    "separability",
    "effective_rank",
    "participation_ratio",
    "first_component",
    "hard",
    "tolerance",
)


def spoken_name(metric: str) -> str:
    """A metric's name in words: "image_to_text_r@1" is "image → text R@1"."""
    known = _NAMES.get(metric)
    return known or metric.replace("_to_", " → ").replace("r@", "R@").replace("_", " ")


def split_direction(metric: str) -> tuple[str, str]:
    """Direction and measure: "image_to_text_r@1" is ("image_to_text", "r@1"); other metrics have no direction ("")."""
    for measure in ("_r@", "_median_rank"):
        direction, found, rest = metric.partition(measure)
        if found:
            return direction, f"{measure[1:]}{rest}"
    return "", metric


def is_share(metric: str) -> bool:
    """Whether the metric is a share of samples, between 0 and 1."""
    return "r@" in metric or metric.startswith("top") or metric.endswith(("top1", "recall", "accuracy"))


def is_count(metric: str) -> bool:
    """Whether the metric only says how much was evaluated."""
    return metric.startswith("num_")


def is_description(metric: str) -> bool:
    """Whether neither more nor less is better in itself."""
    return metric.startswith(_DESCRIPTIONS)


def is_better_high(metric: str) -> bool:
    """Whether more is better: not of ranks, losses and errors, whatever else the name says of them."""
    return _BETTER_LOW.isdisjoint(re.split(r"[^a-z]+", metric.lower()))


def spoken_value(metric: str, value: float) -> str:
    """A metric's value: shares in percent, counts with separators, the rest with four digits."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if is_share(metric):
        return f"{100 * value:.1f}%"
    return f"{value:,.0f}" if is_count(metric) else spoken_number(value)


def spoken_number(value: float) -> str:
    """Four digits, and separators where there are more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
