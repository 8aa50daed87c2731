"""Composition: does a model tell a true caption from one that is almost right? (SugarCrepe, ARO, Winoground)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float64
from pydantic import Field
from torch import Tensor

from eval.choices.compared import check_entries, compositional_questions
from eval.choices.config import QuestionsConfig
from eval.choices.evaluator import QuestionsEvaluator
from eval.choices.examples import QuestionExamples
from eval.choices.files import BenchmarkFile
from eval.choices.question import Questions
from eval.choices.scores import Scores
from eval.encoder import Encoder, evaluation_mode
from eval.evaluator import EVALUATORS, EvaluationContext
from eval.intervals import wilson
from eval.metrics import COMPOSITIONAL, compositional_metrics
from vlm.distributed.world import World
from vlm.evaluation import Evaluation
from vlm.metric import FigureTable, Metric, Unit

_MOST_KINDS = 16
"""Of so many kinds, those with the most questions, the accuracy is a figure of its own."""
_MOST_ROWS = 64
"""Of so many the table has a row."""


@EVALUATORS.register("compositional")
class CompositionalConfig(QuestionsConfig):
    """True captions among captions that are almost right."""

    kind: Annotated[Literal["compositional"], Field(description="the true caption among almost right ones")]
    decoder: Annotated[
        bool, Field(description="Ask the captioning decoder too, where the model has one: about twice the work.")
    ] = True

    def check_entries(self, files: Sequence[BenchmarkFile]) -> None:
        """Raise UserError for files that are no such benchmark."""
        check_entries(files)

    def build(self, context: EvaluationContext) -> "Compositional":
        """See `Compositional`."""
        return Compositional(self, context)


class Compositional(QuestionsEvaluator):
    """How often the true caption is nearer to its image than all that are almost right. Ties are misses.

    Beside it stands what can be answered without looking, since captions may give themselves away (Hsieh et al.,
    2023): by their length in characters, by the nearness to the mean of all images that are asked about, and, with a
    captioning decoder, by their likelihood under an image without content. The decoder also answers by the likelihood
    under the image, and by how far that is above the blind one (Lin et al., 2024).

    Where an example has two images (Winoground), the text score is the share of examples both of whose images prefer
    their caption, the image score that of those both of whose captions prefer their image, the group score both.

    Raises:
        UserError: no wrong captions in the data, or a file that is no such benchmark.
    """

    def __init__(self, config: CompositionalConfig, context: EvaluationContext) -> None:
        super().__init__(config, context, compositional_questions(config, context), decoder=config.decoder)
        self._config = config
        counts = Counter(question.kind for question in self._questions.asked)
        self._kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of all questions, and the accuracy of each kind."""
        return compositional_metrics(self._kinds[:_MOST_KINDS])

    def run(self, model: Encoder, world: World) -> Evaluation:
        """Ask all questions. Collective."""
        with evaluation_mode(model, self._config.embedding, self._config.precision) as encoder:
            scores = self._reader.read(model, encoder, world)
        self.require_answers(scores)
        answered = scores.answered
        right = {name: hits[answered] for name, hits in _answers(scores, self._questions).items()}
        by_kind = _by_kind(self._kinds, [self._questions.asked[place].kind for place in answered.nonzero().flatten()])
        low, high = wilson(int(right["accuracy"].sum()), int(answered.sum()))
        own = {kind: _share(right["accuracy"][chosen]) for kind, chosen in by_kind.items()}
        figures = {
            "accuracy": _share(right["accuracy"]),
            "interval_low": low,
            "interval_high": high,
            "macro_accuracy": sum(own.values()) / len(own),
            "chance": _share(1 / scores.present[answered].sum(1).double()),
            **{name: _share(hits) for name, hits in right.items() if name != "accuracy"},
            **_crossed_figures(scores, self._questions),
            **{f"accuracy_{kind}": own[kind] for kind in self._kinds[:_MOST_KINDS] if kind in own},
            **self.counts(scores),
        }
        examples = QuestionExamples(self._questions, scores)
        return Evaluation(figures, examples=examples, tables={"kinds": _table(right, by_kind)})


def _answers(scores: Scores, questions: Questions) -> dict[str, Bool[Tensor, " questions"]]:
    """Whether each question is answered right, by the name of the figure that it counts for."""
    lengths = torch.full(scores.cosine.shape, torch.nan, dtype=torch.float64)
    for row, question in enumerate(questions.asked):
        lengths[row, : len(question.texts)] = torch.tensor([float(len(text)) for text in question.texts])
    by_name: dict[str, Float64[Tensor, "questions texts"]] = {
        "accuracy": scores.cosine,
        "shorter_wins": -lengths,
        "longer_wins": lengths,
        "mean_image_accuracy": scores.to_mean,
    }
    if scores.likelihood is not None and scores.blind is not None:
        by_name |= {
            "decoder_accuracy": scores.likelihood,
            "decoder_blind_accuracy": scores.blind,
            "decoder_gain_accuracy": scores.likelihood - scores.blind,
        }
    return {name: scores.right(values) for name, values in by_name.items()}


def _crossed_figures(scores: Scores, questions: Questions) -> dict[str, float]:
    """The scores of examples of two images, of which both could be read; nothing where there are none."""
    examples = [pair for pair in questions.crossed if bool(scores.answered[list(pair)].all())]
    if not examples:
        return {}
    first, second = torch.tensor(examples).T
    one, other = scores.cosine[first], scores.cosine[second]
    told_apart = ~scores.same[first, 1]
    text = scores.right(scores.cosine)[first] & scores.right(scores.cosine)[second]
    # The first caption's true image is the first, under the second it stands second; and the other way round.
    image = (one[:, 0] > other[:, 1]) & (other[:, 0] > one[:, 1]) & told_apart
    return {"text_score": _share(text), "image_score": _share(image), "group_score": _share(text & image)}


def _by_kind(kinds: Sequence[str], of_questions: Sequence[str]) -> dict[str, Tensor]:
    """The questions of each kind by number, in the order of the kinds; none of a kind that does not occur."""
    numbers: dict[str, list[int]] = {kind: [] for kind in kinds}
    for number, kind in enumerate(of_questions):
        numbers[kind].append(number)
    return {kind: torch.tensor(chosen) for kind, chosen in numbers.items() if chosen}


def _table(right: Mapping[str, Tensor], by_kind: Mapping[str, Tensor]) -> FigureTable:
    """Every way of answering by kind, the first `_MOST_ROWS` of them."""
    labels = {metric.name: metric.label for metric in COMPOSITIONAL}
    shown = list(by_kind.items())[:_MOST_ROWS]
    rows = {kind: [float(len(chosen)), *(_share(hits[chosen]) for hits in right.values())] for kind, chosen in shown}
    shares: list[Unit] = ["fraction" for _ in right]
    note = f"the {len(rows)} kinds with the most questions, of {len(by_kind):,}" if len(rows) < len(by_kind) else ""
    return FigureTable("kinds", ["questions", *(labels[name] for name in right)], rows, ["count", *shares], note)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
