"""Zero-shot classification: classes described by prompts, images assigned to the nearest (CLIP, arXiv:2103.00020)."""

from functools import cached_property
from typing import Annotated, Literal

import torch
from jaxtyping import Float32
from pydantic import Field
from torch import Tensor

from eval.encoder import (
    Encoder,
    embed_batches,
    embed_images,
    embed_local_texts,
    evaluation_mode,
    gather_ranges,
    local_range,
)
from eval.evaluator import EVALUATORS, EvaluationContext
from eval.gap import Shift, moved_together
from eval.labelled import LabelledEvaluationConfig, LabelledEvaluator
from eval.metrics import ZERO_SHOT, metric_at_shift
from eval.ranks import find_matches, find_matches_shared
from vlm.distributed.world import World
from vlm.evaluation import Evaluation, Metric
from vlm.model.tokenizer import TokenBatch


@EVALUATORS.register("zeroshot")
class ZeroShotConfig(LabelledEvaluationConfig):
    """Zero-shot classification of labelled shards."""

    kind: Annotated[Literal["zeroshot"], Field(description="classes by their names")]
    shifts: Annotated[
        tuple[Shift, ...],
        Field(
            description="Also top-1 with images and classes moved together by shares of their centroids' difference."
        ),
    ] = ()

    def build(self, context: EvaluationContext) -> "ZeroShot":
        """See `ZeroShot`."""
        return ZeroShot(self, context)


class ZeroShot(LabelledEvaluator):
    """The share of images whose class has the nearest embedding: the normalised mean over its prompts.

    Top-5 is the share of images with fewer than five classes as near as their own. With `shifts` (see
    `moved_together`; the clouds are those of the images and of the classes) every rank holds all images' embeddings.
    """

    def __init__(self, config: ZeroShotConfig, context: EvaluationContext) -> None:
        self._config = config
        super().__init__(config, context)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of `ZERO_SHOT`, and top-1 at each shift."""
        return (*ZERO_SHOT, *(metric_at_shift(ZERO_SHOT[0], shift) for shift in self._config.shifts))

    def run(self, model: Encoder, world: World) -> Evaluation:
        """Classify all images. Collective."""
        with evaluation_mode(model, self._config.embedding, self._config.precision) as encoder:
            classes = self.class_embeddings(encoder, world)
            if self._config.shifts:
                return Evaluation(self._moved(encoder, classes, world))
            return Evaluation(self._in_batches(encoder, classes, world))

    def _in_batches(self, model: Encoder, classes: Float32[Tensor, "classes dim"], world: World) -> dict[str, float]:
        """Each rank looks at its own images, batch by batch."""
        config = self._config
        counts = torch.zeros(3, len(classes), dtype=torch.int64, device=world.device)
        for batch, rows in embed_batches(model, self._held_out, world, config.batch_size, config.workers):
            assert batch.labels is not None  # the constructor refused a set without
            labels = batch.labels[batch.valid]
            matches = find_matches(rows[batch.valid], classes, *self._groups(labels))
            counts += self._counts(matches.ranks, labels)
        return self._figures(world.sum(counts).double())

    def _moved(self, model: Encoder, classes: Float32[Tensor, "classes dim"], world: World) -> dict[str, float]:
        """All images at once: their centroid is that of the same rows in the same order on any number of ranks."""
        config = self._config
        images, indices = embed_images(model, self._held_out, world, config.batch_size, config.workers)
        assert self._held_out.labels is not None
        labels = self._held_out.labels.to(world.device)[indices]
        groups = self._groups(labels)
        ranks = find_matches_shared(images, classes, *groups, world).ranks
        figures = self._figures(self._counts(ranks, labels).double())
        for shift in config.shifts:
            moved = find_matches_shared(*moved_together(images, classes, shift), *groups, world).ranks
            at_shift = self._figures(self._counts(moved, labels).double())
            figures[metric_at_shift(ZERO_SHOT[0], shift).name] = at_shift[ZERO_SHOT[0].name]
        return figures

    def class_embeddings(self, model: Encoder, world: World) -> Float32[Tensor, "classes dim"]:
        """One unit-norm row a class, the mean of its prompts' embeddings; the ranks encode in turn. Collective."""
        num_templates, num_classes = len(self._classes.templates), len(self._classes.names)
        local, most = local_range(num_classes, world)
        prompts = range(local.start * num_templates, local.stop * num_templates)
        rows = embed_local_texts(model, self._prompts, prompts, most * num_templates, world, self._config.batch_size)
        means = rows.reshape(len(local), num_templates, -1).mean(dim=1)
        return gather_ranges(means / means.norm(dim=1, keepdim=True), most, num_classes, world)

    @cached_property
    def _prompts(self) -> TokenBatch:
        return self._tokenizer(self._classes.prompts())
