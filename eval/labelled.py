"""Images of labelled shards, the prompts of their classes, and the figures of whoever assigns one to the other."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from jaxtyping import Float64, Int64
from pydantic import Field
from torch import Tensor

from eval.classes import ClassPrompts, load_class_prompts
from eval.equal_texts import equal_rows, equal_tokens, token_rows
from eval.evaluator import EvaluationContext
from eval.shards import ShardEvaluationConfig
from vlm.checkpoint.data_record import DataRecord
from vlm.errors import UserError
from vlm.evaluation import Evaluator
from vlm.model.tokenizer import TokenBatch
from vlm.skip import Skip

_STRINGS = tuple[str, ...]


class LabelledEvaluationConfig(ShardEvaluationConfig):
    """Labelled shards, and the words for their classes."""

    classes: Annotated[str | _STRINGS, Field(description='Class names: a list, a JSON file, or "imagenet".')]
    templates: Annotated[
        str | _STRINGS | None,
        Field(description='Prompts with {} for the name: a list, a JSON file, "openai-imagenet" or "simple".'),
    ] = None


class LabelledEvaluator(Evaluator):
    """The base of evaluators that assign images to classes.

    Classes whose prompts are all equal (to the tokenizer) stand in the order of their labels, so the first of them is
    the answer, as it is for the public harnesses, which take the first of the highest scores; any other tie counts as a
    miss.

    Raises:
        UserError: shards without labels, a label without a class, unusable class names or templates.
    """

    def __init__(self, config: LabelledEvaluationConfig, context: EvaluationContext) -> None:
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

    def _groups(self, labels: Int64[Tensor, " images"]) -> tuple[Int64[Tensor, "images 1"], Int64[Tensor, "classes 1"]]:
        """The group of each image's class, and of each class: those with equal prompts are one."""
        groups = self._first_equal.to(labels.device)
        return groups[labels, None], groups[:, None]

    def _counts(self, ranks: Int64[Tensor, " images"], labels: Int64[Tensor, " images"]) -> Int64[Tensor, "3 classes"]:
        """The number of images of each class, of those whose class comes first, and of those where it is in five.

        `ranks` are those of each image's class, of which the first is 1, classes of equal prompts as one.
        """
        ranks = ranks + self._earlier.to(labels.device)[labels]
        counted = (labels, labels[ranks <= 1], labels[ranks <= 5])
        return torch.stack([torch.bincount(rows, minlength=len(self._classes.names)) for rows in counted])

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
