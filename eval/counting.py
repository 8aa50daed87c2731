"""Counting: does a model find the caption with the right number? (CountBench: Paiss et al., 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Int64
from pydantic import Field, field_validator
from torch import Tensor

from data.counterfactuals.numbers import WORDS
from eval.choices.config import QuestionsConfig
from eval.choices.counted import check_entries, counting_questions, numbers_of
from eval.choices.evaluator import QuestionsEvaluator
from eval.choices.examples import QuestionExamples
from eval.choices.files import BenchmarkFile
from eval.choices.scores import Scores
from eval.encoder import Encoder, evaluation_mode
from eval.evaluator import EVALUATORS, EvaluationContext
from eval.intervals import wilson
from eval.metrics import counting_metrics
from vlm.distributed.world import World
from vlm.evaluation import Evaluation, FigureTable, Metric

PLOT = "confusion.png"
Number = Annotated[int, Field(ge=min(WORDS), le=max(WORDS))]


@EVALUATORS.register("counting")
class CountingConfig(QuestionsConfig):
    """Captions with the right number among those with another, over counted images."""

    kind: Annotated[Literal["counting"], Field(description="the caption with the right number")]
    numbers: Annotated[tuple[Number, ...], Field(min_length=2, description="The numbers that are asked for.")] = tuple(
        WORDS
    )

    plots: ClassVar[tuple[str, ...]] = (PLOT,)

    @field_validator("numbers")
    @classmethod
    def _each_once(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"numbers: one of them stands there twice ({', '.join(map(str, numbers))})")
        return tuple(sorted(numbers))

    def check_entries(self, files: Sequence[BenchmarkFile]) -> None:
        """Raise UserError for files that are no such benchmark."""
        check_entries(files)

    def build(self, context: EvaluationContext) -> "Counting":
        """See `Counting`."""
        return Counting(self, context)


class Counting(QuestionsEvaluator):
    """How often the caption with the right number is nearest to its image, among those with each other number.

    The answer is the number of the nearest caption. A tie is a miss, and so are captions that the model cannot tell
    apart and scores that are no number: then the answer is, of the captions that are at least as near as the true one,
    the nearest, and of several such the one that is farthest off.

    Raises:
        UserError: nothing counted in the data, or a file that is no such benchmark.
    """

    def __init__(self, config: CountingConfig, context: EvaluationContext) -> None:
        questions = counting_questions(config, config.numbers, context)
        super().__init__(config, context, questions)
        self._config: CountingConfig = config
        self._named = torch.tensor([numbers_of(question, config.numbers) for question in questions.asked])

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of all numbers, and the accuracy and count of each that is asked for."""
        return counting_metrics({number: WORDS[number] for number in self._config.numbers})

    def run(self, model: Encoder, world: World) -> Evaluation:
        """Ask all questions. Collective."""
        with evaluation_mode(model, self._config.embedding, self._config.precision) as encoder:
            scores = self._reader.read(model, encoder, world)
        self.require_answers(scores)
        truths = self._named[scores.answered, 0]
        chosen = answers(scores, self._named)[scores.answered]
        numbers = self._config.numbers
        confusion = [[int(((truths == truth) & (chosen == other)).sum()) for other in numbers] for truth in numbers]
        figures = {**_figures(truths, chosen, numbers), **self.counts(scores)}
        table = FigureTable(
            "answers by right number",
            [WORDS[number] for number in numbers],
            {WORDS[number]: row for number, row in zip(numbers, confusion, strict=True)},
            "count",
            "rows: the right number; columns: the answer",
        )
        examples = QuestionExamples(self._questions, scores)
        plots = ConfusionPlot(confusion, numbers)
        return Evaluation(figures, examples=examples, plots=plots, tables={"confusion": table})


@dataclass(frozen=True)
class ConfusionPlot:
    """How often each number was the answer to each, as a picture."""

    counts: Sequence[Sequence[int]]
    numbers: Sequence[int]

    def write(self, folder: Path) -> Sequence[Path]:
        """Write the file called `PLOT`, whole or not at all."""
        from eval.confusion_plot import write_confusion  # matplotlib takes its time to import

        return [write_confusion(self.counts, [WORDS[number] for number in self.numbers], folder / PLOT)]


def answers(scores: Scores, named: Int64[Tensor, "questions texts"]) -> Int64[Tensor, " questions"]:
    """The number that is the answer to each question, of those that its texts name, the right one first."""
    cosine = scores.cosine
    own = cosine[:, :1].expand_as(cosine)
    lost = scores.present & ~scores.wins(cosine)
    lost[:, 0] = False
    usable = torch.where(scores.same, own, cosine).nan_to_num(nan=torch.inf).masked_fill(~lost, -torch.inf)
    nearest = lost & (usable == usable.amax(1, keepdim=True))
    # The farthest off; of two that are as far, the less.
    order = torch.where(nearest, (named - named[:, :1]).abs() * 1000 - named, -1_000_000)
    wrong = named.gather(1, order.argmax(1, keepdim=True))[:, 0]
    return torch.where(lost.any(1), wrong, named[:, 0])


def _figures(truths: Tensor, chosen: Tensor, numbers: Sequence[int]) -> dict[str, float]:
    right = truths == chosen
    low, high = wilson(int(right.sum()), len(right))
    counts = {number: int((truths == number).sum()) for number in numbers}
    by_number = {number: _share(right[truths == number]) for number in numbers if counts[number]}
    return {
        "accuracy": _share(right),
        "interval_low": low,
        "interval_high": high,
        "macro_accuracy": sum(by_number.values()) / len(by_number),
        "mean_absolute_deviation": float((truths - chosen).abs().double().mean()),
        "chance": 1 / len(numbers),
        **{f"accuracy_{number}": share for number, share in by_number.items()},
        **{f"num_{number}": count for number, count in counts.items()},
    }


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
