"""The metrics of the evaluators that ship, declared where a report finds them without importing the evaluators."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlm.geometry.names import FIGURES
from vlm.metric import Metric

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
_ACCURACY = Metric(
    "accuracy",
    "higher",
    "questions whose true text is nearer to the image than all others",
    unit="fraction",
    label="accuracy",
    prominence="headline",
)
_INTERVAL = (
    Metric(
        "interval_low",
        None,
        "the least accuracy that is likely over such questions (95 %, Wilson)",
        unit="fraction",
        label="accuracy from (95 %)",
        prominence="detail",
    ),
    Metric(
        "interval_high",
        None,
        "the greatest accuracy that is likely over such questions (95 %, Wilson)",
        unit="fraction",
        label="accuracy to (95 %)",
        prominence="detail",
    ),
)
_MACRO = Metric("macro_accuracy", "higher", "accuracy, averaged over kinds", unit="fraction", label="mean over kinds")
_CHANCE = Metric("chance", None, "the accuracy of guessing", unit="fraction", label="chance", prominence="detail")
_ASKED = (
    Metric("num_samples", description="questions that were answered", unit="count", label="questions"),
    replace(_NUM_SKIPPED, description="questions that could not be asked, or whose image cannot be read"),
    Metric("num_missing", description="questions without an image", unit="count", label="without image"),
)


def counting_metrics(words: Mapping[int, str]) -> tuple[Metric, ...]:
    """The metrics of counting by numbers, which have these words."""
    by_number = (
        Metric(
            f"accuracy_{number}",
            "higher",
            f"images of {word} whose nearest caption says so",
            unit="fraction",
            label=word,
            group="accuracy of",
            prominence="detail",
        )
        for number, word in words.items()
    )
    asked = (
        Metric(f"num_{number}", description=f"images of {word}", unit="count", label=f"of {word}", prominence="detail")
        for number, word in words.items()
    )
    return (
        _ACCURACY,
        *_INTERVAL,
        replace(_MACRO, description="accuracy, averaged over the numbers that occur", label="mean over numbers"),
        Metric(
            "mean_absolute_deviation",
            "lower",
            "how far the answer is from the right number, on average",
            label="mean absolute deviation",
        ),
        _CHANCE,
        *by_number,
        *_ASKED,
        *asked,
    )


def _without_looking(name: str, label: str, words: str) -> Metric:
    return Metric(
        name, None, f"questions that are answered right {words}", unit="fraction", label=label, group="answered by"
    )


COMPOSITIONAL = (
    _ACCURACY,
    *_INTERVAL,
    _MACRO,
    _CHANCE,
    _without_looking("shorter_wins", "shortest text", "by taking the shortest text"),
    _without_looking("longer_wins", "longest text", "by taking the longest text"),
    _without_looking(
        "mean_image_accuracy",
        "mean image",
        "by nearness to the mean of all images, without the own one",
    ),
    _without_looking("decoder_accuracy", "likelihood", "by the decoder's likelihood under the image"),
    _without_looking(
        "decoder_blind_accuracy",
        "blind likelihood",
        "by the decoder's likelihood under an image without content",
    ),
    _without_looking("decoder_gain_accuracy", "gain", "by how much likelier the image makes a text to the decoder"),
    Metric(
        "text_score", "higher", "examples both of whose images prefer their text", unit="fraction", label="text score"
    ),
    Metric(
        "image_score", "higher", "examples both of whose texts prefer their image", unit="fraction", label="image score"
    ),
    Metric("group_score", "higher", "examples that are right both ways", unit="fraction", label="group score"),
    *_ASKED,
)


def compositional_metrics(kinds: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of composition over questions of these kinds."""
    by_kind = (
        Metric(
            f"accuracy_{kind}",
            "higher",
            f"accuracy of the questions of {kind}",
            unit="fraction",
            label=kind.replace("_", " "),
            group="accuracy of",
            prominence="detail",
        )
        for kind in kinds
    )
    return (*COMPOSITIONAL, *by_kind)


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
