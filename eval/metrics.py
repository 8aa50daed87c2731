"""The metrics of the evaluators that ship, declared where a report finds them without importing the evaluators."""

import re
from dataclasses import replace

from vlm.evaluation import Metric
from vlm.geometry.telemetry import FIGURES

DIRECTIONS = ("image_to_text", "text_to_image")
RECALLS = (1, 5, 10)
_AT_SHIFT = re.compile(r"shift_(-?\d+(?:\.\d+)?(?:e[-+]\d+)?)_(.+)")
_NUM_IMAGES = Metric("num_images", description="images that were used", unit="count", label="images")
_NUM_SKIPPED = Metric("num_skipped", description="samples that were of no use", unit="count", label="skipped samples")

ZERO_SHOT = (
    Metric(
        "top1",
        "higher",
        "images whose class has the nearest embedding",
        unit="fraction",
        label="top-1",
        prominence="headline",
    ),
    Metric(
        "top5",
        "higher",
        "images with fewer than five classes as near as their own",
        unit="fraction",
        label="top-5",
        prominence="detail",
    ),
    Metric(
        "mean_per_class_recall",
        "higher",
        "top-1 of each class that occurs, averaged over classes",
        unit="fraction",
        label="mean per-class recall",
    ),
    Metric("num_samples", description="images that were classified", unit="count", label="samples"),
    _NUM_SKIPPED,
)
_LIKELIEST = {
    "top1": "images whose class has the likeliest prompt under the captioning decoder",
    "top5": "images with fewer than five classes as likely as their own",
}
GENERATIVE_ZERO_SHOT = tuple(
    replace(metric, description=_LIKELIEST.get(metric.name, metric.description)) for metric in ZERO_SHOT
)


def direction_metrics(direction: str) -> tuple[Metric, ...]:
    """The metrics of one direction, "image_to_text" or "text_to_image"."""
    queries, _, candidates = direction.partition("_to_")
    group = f"{queries} → {candidates}"
    recalls = (
        Metric(
            f"{direction}_r@{most}",
            "higher",
            f"{queries}s with a right {candidates} among the nearest {most}",
            unit="fraction",
            label=f"R@{most}",
            group=group,
            prominence="headline" if most == 1 else "detail",
        )
        for most in RECALLS
    )
    rank = f"the median place of the nearest right {candidates}"
    return (*recalls, Metric(f"{direction}_median_rank", "lower", rank, label="median rank", group=group))


RETRIEVAL = (
    *(metric for direction in DIRECTIONS for metric in direction_metrics(direction)),
    _NUM_IMAGES,
    Metric("num_texts", description="captions that were used", unit="count", label="captions"),
    _NUM_SKIPPED,
)
_DESCRIPTIONS = {**FIGURES, "separability": "held-out accuracy of a logistic regression that tells images from texts"}
GEOMETRY = (
    *(Metric(name, description=description) for name, description in _DESCRIPTIONS.items()),
    Metric(
        "arithmetic_r@1",
        "higher",
        "images to which the difference of two texts leads from another image",
        unit="fraction",
        label="arithmetic R@1",
    ),
    _NUM_IMAGES,
    _NUM_SKIPPED,
)
CAPTIONING = (
    Metric(
        "cider_d",
        "higher",
        "likeness of generated captions to the references in their telling words (CIDEr-D)",
        label="CIDEr-D",
        prominence="headline",
    ),
    Metric("bleu_4", "higher", "runs of up to four words that a reference has too (BLEU-4)", label="BLEU-4"),
    Metric("rouge_l", "higher", "longest common subsequence with a reference (ROUGE-L)", label="ROUGE-L"),
    Metric(
        "self_clip_score",
        "higher",
        "2.5 times the cosine of image and generated caption, at least 0, by this model's own towers",
        label="CLIPScore by itself",
    ),
    Metric(
        "true_image_preferred",
        "higher",
        "captions that are likelier under their own image than under another",
        unit="fraction",
        label="true image preferred",
    ),
    Metric("nll_per_token", "lower", "mean of -log p of the reference captions' tokens, in nats", label="NLL a token"),
    Metric("caption_length", None, "mean number of tokens of generated captions", label="caption length"),
    _NUM_IMAGES,
    _NUM_SKIPPED,
)
RECALLS_AT_1 = tuple(direction_metrics(direction)[0] for direction in DIRECTIONS)
_ALL = {metric.name: metric for metric in (*ZERO_SHOT, *RETRIEVAL, *GEOMETRY, *CAPTIONING)}


def metric_at_shift(metric: Metric, shift: float) -> Metric:
    """The same figure with the clouds moved together."""
    return replace(
        metric,
        name=f"shift_{shift:g}_{metric.name}",
        description=f"{metric.description}, images and texts moved together by {shift:g} of their gap",
        label=f"{metric.label}, shift {shift:g}",
        prominence="usual",
    )


def shipped_metric(name: str) -> Metric | None:
    """The metric that a shipped evaluator has under this name: a run of before metrics were declared has no others."""
    if (moved := _AT_SHIFT.fullmatch(name)) and moved[2] in _ALL:
        return metric_at_shift(_ALL[moved[2]], float(moved[1]))
    return _ALL.get(name)
