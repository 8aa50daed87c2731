"""Zero-shot classification: classes described by prompts, images assigned to the nearest (CLIP, arXiv:2103.00020)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Literal

import torch
from jaxtyping import Float32, Float64, Int64
from pydantic import Field
from torch import Tensor

from eval.classes import ClassPrompts, load_class_prompts
from eval.encoder import (
    Encoder,
    embed_batches,
    embed_images,
    embed_local_texts,
    evaluation_mode,
    gather_ranges,
    local_range,
)
from eval.equal_texts import equal_rows, equal_tokens, token_rows
from eval.evaluator import EVALUATORS, EvaluationContext
from eval.gap import Shift, moved_together
from eval.metrics import ZERO_SHOT, metric_at_shift
from eval.ranks import find_matches, find_matches_shared
from eval.shards import ShardEvaluationConfig
from vlm.batch import Skip
from vlm.checkpoint.data_record import DataRecord
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.evaluation import Evaluation, Evaluator, Metric
from vlm.model.tokenizer import TokenBatch

_STRINGS = tuple[str, ...]


@EVALUATORS.register("zeroshot")
class ZeroShotConfig(ShardEvaluationConfig):
    """Zero-shot classification of labelled shards."""

    kind: Annotated[Literal["zeroshot"], Field(description="classes by their names")]
    classes: Annotated[str | _STRINGS, Field(description='Class names: a list, a JSON file, or "imagenet".')]
    templates: Annotated[
        str | _STRINGS | None,
        Field(description='Prompts with {} for the name: a list, a JSON file, "openai-imagenet" or "simple".'),
    ] = None
    shifts: Annotated[
        tuple[Shift, ...],
        Field(
            description="Also top-1 with images and classes moved together by shares of their centroids' difference."
        ),
    ] = ()

    def build(self, context: EvaluationContext) -> "ZeroShot":
        """See `ZeroShot`."""
        return ZeroShot(self, context)


class ZeroShot(Evaluator):
    """The share of images whose class has the nearest embedding: the normalised mean over its prompts.

    Top-5 is the share of images with fewer than five classes as near as their own. Classes whose prompts are all equal
    (to the tokenizer) stand in the order of their labels, so the first of them is the answer, as it is for the public
    harnesses, which take the first of the highest scores; any other tie counts as a miss. With
    `shifts` (see `moved_together`; the clouds are those of the images and of the classes) every rank holds all images'
    embeddings.

    Raises:
        UserError: shards without labels, a label without a class, unusable class names or templates.
    """

    def __init__(self, config: ZeroShotConfig, context: EvaluationContext) -> None:
        self._config = config
        self._tokenizer = context.tokenizer
        self._classes = load_class_prompts(config.classes, config.templates, context.root)
        self._held_out = config.held_out(context)
        self._where = context.where("shards")
        self._check_labels()
        self._first_equal = equal_classes(self._classes, context.tokenizer)
        self._earlier = (self._first_equal[:, None] == self._first_equal).tril(-1).sum(dim=1)

    @property
    def notices(self) -> tuple[str, ...]:
        """A line on classes that no model can tell apart, where there are any."""
        later = self._earlier.nonzero().flatten().tolist()
        if not later:
            return ()
        first = int(self._first_equal[later[0]])
        name = self._classes.names[later[0]]
        more = f", and {len(later) - 1} more such" if len(later) > 1 else ""
        return (
            f"{self._where}: classes {first} and {later[0]} ({name!r}) have equal prompts: "
            f"the first is the answer to both{more}",
        )

    @property
    def records(self) -> dict[str, DataRecord]:
        """The set that is measured on."""
        return {"shards": self._held_out.record}

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """The samples that were of no use so far, as far as this rank knows."""
        return self._held_out.skipped

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
        config, num_classes = self._config, len(classes)
        counts = torch.zeros(3, num_classes, dtype=torch.int64, device=world.device)
        for batch, rows in embed_batches(model, self._held_out, world, config.batch_size, config.workers):
            assert batch.labels is not None  # the constructor refused a set without
            labels = batch.labels[batch.valid]
            matches = find_matches(rows[batch.valid], classes, *self._groups(labels))
            counts += _counts(matches.ranks + self._earlier.to(labels.device)[labels], labels, num_classes)
        return self._figures(world.sum(counts).double())

    def _moved(self, model: Encoder, classes: Float32[Tensor, "classes dim"], world: World) -> dict[str, float]:
        """All images at once: their centroid is that of the same rows in the same order on any number of ranks."""
        config, num_classes = self._config, len(classes)
        images, indices = embed_images(model, self._held_out, world, config.batch_size, config.workers)
        assert self._held_out.labels is not None
        labels = self._held_out.labels.to(world.device)[indices]
        groups, earlier = self._groups(labels), self._earlier.to(world.device)[labels]
        ranks = find_matches_shared(images, classes, *groups, world).ranks + earlier
        figures = self._figures(_counts(ranks, labels, num_classes).double())
        for shift in config.shifts:
            moved = find_matches_shared(*moved_together(images, classes, shift), *groups, world).ranks + earlier
            figures[metric_at_shift(ZERO_SHOT[0], shift).name] = float((moved <= 1).double().mean())
        return figures

    def class_embeddings(self, model: Encoder, world: World) -> Float32[Tensor, "classes dim"]:
        """One unit-norm row a class, the mean of its prompts' embeddings; the ranks encode in turn. Collective."""
        num_templates, num_classes = len(self._classes.templates), len(self._classes.names)
        local, most = local_range(num_classes, world)
        prompts = range(local.start * num_templates, local.stop * num_templates)
        rows = embed_local_texts(model, self._prompts, prompts, most * num_templates, world, self._config.batch_size)
        means = rows.reshape(len(local), num_templates, -1).mean(dim=1)
        return gather_ranges(means / means.norm(dim=1, keepdim=True), most, num_classes, world)

    def _groups(self, labels: Int64[Tensor, " images"]) -> tuple[Int64[Tensor, "images 1"], Int64[Tensor, "classes 1"]]:
        groups = self._first_equal.to(labels.device)
        return groups[labels, None], groups[:, None]

    @cached_property
    def _prompts(self) -> TokenBatch:
        return self._tokenizer(self._classes.prompts())

    def _figures(self, counts: Float64[Tensor, "3 classes"]) -> dict[str, float]:
        images, first, in_five = counts
        num_samples = int(images.sum())
        if num_samples == 0:
            raise UserError(f"{self._where}: none of the {len(self._held_out)} samples can be read")
        occurs = images > 0
        return {
            "top1": float(first.sum() / num_samples),
            "top5": float(in_five.sum() / num_samples),
            "mean_per_class_recall": float((first[occurs] / images[occurs]).mean()),
            "num_samples": num_samples,
            "num_skipped": len(self._held_out) - num_samples,
        }

    def _check_labels(self) -> None:
        labels = self._held_out.labels
        if labels is None:
            raise UserError(self._held_out.without("label", "a cls file with the number of its class"))
        largest = int(labels.max())
        if largest >= len(self._classes.names):
            key = self._held_out.keys()[int(labels.argmax())]
            raise UserError(
                f"{self._where}: sample {key} has label {largest}, but there are {len(self._classes.names)} classes "
                f"(labels 0 to {len(self._classes.names) - 1})"
            )


def equal_classes(classes: ClassPrompts, tokenizer: Callable[[Sequence[str]], TokenBatch]) -> Int64[Tensor, " classes"]:
    """The first class with the same prompts, to the tokenizer, in every template: for most classes they themselves."""
    same = equal_tokens(tokenizer(replace(classes, templates=classes.templates[:1]).prompts()))
    repeated = (torch.bincount(same, minlength=len(same))[same] > 1).nonzero().flatten()
    if len(repeated):
        names = tuple(classes.names[place] for place in repeated.tolist())
        prompts = tokenizer(replace(classes, names=names).prompts())
        same = torch.arange(len(same))
        same[repeated] = repeated[equal_rows(token_rows(prompts).reshape(len(names), -1))]
    return same


def _counts(
    ranks: Int64[Tensor, " images"], labels: Int64[Tensor, " images"], num_classes: int
) -> Int64[Tensor, "3 {num_classes}"]:
    """The number of images of each class, of those with rank 1, and of those with ranks up to 5."""
    counted = (labels, labels[ranks <= 1], labels[ranks <= 5])
    return torch.stack([torch.bincount(rows, minlength=num_classes) for rows in counted])
