"""The geometry of held-out embeddings: both clouds, the gap between them, and what moving it does to retrieval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64
from pydantic import Field
from torch import Tensor

from eval.captioned import CaptionedEvaluator, CaptionedImages, Embedded
from eval.encoder import Encoder, evaluation_mode
from eval.evaluator import EVALUATORS, EvaluationContext
from eval.gap import Shift, moved_together
from eval.metrics import GEOMETRY, RECALLS_AT_1, metric_at_shift
from eval.ranks import find_matches_shared, score
from eval.shards import CaptionedEvaluationConfig
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.evaluation import Evaluation, Metric
from vlm.geometry.clouds import figures_of_clouds, tolerance
from vlm.geometry.negatives import hardness, score_histograms
from vlm.model.logit_scale import current_scale

PLOTS = ("clouds.png", "scores.png", "spectra.png")
_HELD_OUT = 5  # of so many pairs one is held out from the classifier


@EVALUATORS.register("geometry")
class GeometryEvaluationConfig(CaptionedEvaluationConfig):
    """The geometry of the captioned samples of shards."""

    kind: Annotated[Literal["geometry"], Field(description="the clouds of embeddings and the gap between them")]
    shifts: Annotated[
        tuple[Shift, ...],
        Field(description="Shares of the centroids' difference by which the clouds are moved together."),
    ] = (-0.5, 0.0, 0.5, 1.0, 1.5)
    sample: Annotated[
        int, Field(ge=5, le=16384, description="Pairs whose products are all looked at, evenly spaced.")
    ] = 2048

    plots: ClassVar[tuple[str, ...]] = PLOTS

    def build(self, context: EvaluationContext) -> "Geometry":
        """See `Geometry`."""
        return Geometry(self, context)


@runtime_checkable
class ScaledEncoder(Protocol):
    """A model with a learned logit scale, kept as its logarithm."""

    logit_scale: Tensor


@dataclass(frozen=True)
class MeasuredGeometry:
    """The figures of two clouds of embeddings by name, and the clouds themselves; it writes them as plots.

    `spectra` holds each modality's shares of variance, `scores` the counts of cosines of positives and of hardest
    negatives in equal bins from -1 to 1, `images` and `texts` the pairs themselves.
    """

    figures: dict[str, float]
    spectra: dict[str, list[float]]
    scores: dict[str, list[int]]
    images: Float32[Tensor, "pairs dim"]
    texts: Float32[Tensor, "pairs dim"]

    def write(self, folder: Path) -> Sequence[Path]:
        """Write the files called `PLOTS`, each whole or not at all."""
        from eval.geometry_plots import write_plots  # matplotlib and t-SNE take their time to import

        return write_plots(self, folder)


class Geometry(CaptionedEvaluator):
    """Pairs of an image and its first caption as two clouds, and retrieval of all captions under a moving gap.

    `separability` is the held-out accuracy of a logistic regression that tells images from texts, every fifth pair held
    out (Fahim et al., 2024). `arithmetic_r@1` is the share of pairs i, with j the next one, for which
    x_i + y_j - y_i is nearer to x_j than to any other image but x_i: the difference of two texts leads from image to
    image (the arithmetic of Couairon et al., 2022, on any captions).

    The negatives' weights are at the model's own logit scale, tolerance is measured where there are labels. For a
    shift, see `moved_together`.

    Raises:
        UserError: shards without captions; when measured, fewer than five usable pairs, or embeddings without numbers.
    """

    def __init__(self, config: GeometryEvaluationConfig, context: EvaluationContext) -> None:
        self._config = config
        self._where = context.where("shards")
        self._captioned = CaptionedImages(config, context)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of `GEOMETRY`, and R@1 both ways at each shift."""
        moved = (metric_at_shift(recall, shift) for shift in self._config.shifts for recall in RECALLS_AT_1)
        return (*GEOMETRY, *moved)

    def run(self, model: Encoder, world: World) -> Evaluation:
        """Figures, spectra and scores as curves, and plots. Collective."""
        measured = self.measure(model, world)
        curves: dict[str, Mapping[str, Sequence[float]]] = {"spectra": measured.spectra, "scores": measured.scores}
        return Evaluation(measured.figures, curves=curves, plots=measured)

    def measure(self, model: Encoder, world: World) -> MeasuredGeometry:
        """Both clouds, and their figures. Collective."""
        with evaluation_mode(model, self._config.embedding, self._config.precision) as encoder:
            embedded = self._captioned.embed(encoder, world)
            moved = {shift: self._retrieval(embedded, shift, world) for shift in self._config.shifts}
        images, texts = first_pairs(embedded)
        self._require_usable(images, texts)
        count = min(self._config.sample, len(images))
        places = torch.arange(count, device=images.device) * len(images) // count
        images, texts = images[places], texts[places]
        similarities = images @ texts.T
        figures, spectra = figures_of_clouds(images, texts)
        figures |= self._tolerances(images, texts, embedded.image_owners[places])
        if isinstance(model, ScaledEncoder):
            hard = hardness(similarities, current_scale(model.logit_scale))
            figures |= {"hardness_entropy": hard.entropy, "hardest_negative_weight": hard.hardest}
        figures["separability"] = separability(images, texts)
        figures["arithmetic_r@1"] = arithmetic_accuracy(images, texts)
        for shift, recalls in moved.items():
            for metric, recall in zip(RECALLS_AT_1, recalls, strict=True):
                figures[metric_at_shift(metric, shift).name] = recall
        figures["num_images"] = len(embedded.images)
        figures["num_skipped"] = len(self._captioned.held_out) - len(embedded.images)
        positives, hardest = score_histograms(similarities)
        scores = {"positive": positives.tolist(), "hardest_negative": hardest.tolist()}
        return MeasuredGeometry(
            figures, {name: components.tolist() for name, components in spectra.items()}, scores, images, texts
        )

    def _tolerances(self, images: Tensor, texts: Tensor, owners: Int64[Tensor, " pairs"]) -> dict[str, float]:
        """Tolerance, where the shards have labels and two pairs of some class."""
        labels = self._captioned.held_out.labels
        if labels is None:
            return {}
        labels = labels.to(owners.device)[owners]
        figures = {"tolerance_image": tolerance(images, labels), "tolerance_text": tolerance(texts, labels)}
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def _require_usable(self, images: Tensor, texts: Tensor) -> None:
        if len(images) < _HELD_OUT:
            raise EveryRankError(f"{self._where}: geometry needs {_HELD_OUT} usable pairs; there are {len(images)}")
        if not bool((images.isfinite() & texts.isfinite()).all()):
            raise EveryRankError(f"{self._where}: the model's embeddings are not finite numbers")

    def _retrieval(self, embedded: Embedded, shift: float, world: World) -> tuple[float, float]:
        """R@1 of images to texts and back, with the clouds moved together."""
        images, texts = moved_together(embedded.images, embedded.texts, shift)
        groups = embedded.image_groups, embedded.text_groups
        to_text = find_matches_shared(images, texts, *groups, world).ranks
        to_image = find_matches_shared(texts, images, *groups[::-1], world).ranks
        return float((to_text <= 1).double().mean()), float((to_image <= 1).double().mean())


def first_pairs(embedded: Embedded) -> tuple[Float32[Tensor, "images dim"], Float32[Tensor, "images dim"]]:
    """Each image with the first of its captions, whose owners come in order."""
    return embedded.images, embedded.texts[torch.searchsorted(embedded.text_owners, embedded.image_owners)]


def separability(images: Float32[Tensor, "pairs dim"], texts: Float32[Tensor, "pairs dim"]) -> float:
    """The accuracy with which a logistic regression tells images from texts, on every fifth pair; 0.5 is chance."""
    from sklearn.linear_model import LogisticRegression  # takes its time to import

    held_out = np.arange(len(images)) % _HELD_OUT == _HELD_OUT - 1
    x, y = images.cpu().numpy().astype(np.float64), texts.cpu().numpy().astype(np.float64)
    train, test = (np.concatenate([x[pairs], y[pairs]]) for pairs in (~held_out, held_out))
    labels = [np.repeat([1, 0], int(pairs.sum())) for pairs in (~held_out, held_out)]
    return float(LogisticRegression(max_iter=1000).fit(train, labels[0]).score(test, labels[1]))


def arithmetic_accuracy(images: Float32[Tensor, "pairs dim"], texts: Float32[Tensor, "pairs dim"]) -> float:
    """See `Geometry`; ties count against the model."""
    queries = images + texts.roll(-1, 0) - texts
    scores = score(queries, images)
    scores.fill_diagonal_(-torch.inf)
    targets = (torch.arange(len(images), device=images.device) + 1) % len(images)
    target_scores = scores.gather(1, targets[:, None])
    return float(((scores >= target_scores).sum(1) == 1).double().mean())
