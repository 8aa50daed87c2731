"""The questions that a model answers best and worst, as pictures with their nearest texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.choices.question import Questions
from eval.choices.scores import Scores
from eval.examples import Examples, RetrievalExample, Retrieved, picture

NUM_EXAMPLES = 6  # best and worst answers each
_NUM_TEXTS = 5


@dataclass(frozen=True)
class QuestionExamples:
    """The best are those whose true text is furthest above all others; pictures are read when they are written."""

    questions: Questions
    scores: Scores

    def write(self, folder: Path) -> Sequence[Path]:
        """Write pictures and listing as `Examples` does."""
        return self.choose(NUM_EXAMPLES).write(folder)

    def choose(self, count: int) -> Examples[RetrievalExample]:
        """The `count` best and the `count` worst."""
        cosine, present = self.scores.cosine, self.scores.present
        others = cosine.nan_to_num(nan=2.0).masked_fill(~present, -2)[:, 1:].amax(1)  # cosines lie between
        margins = (cosine[:, 0] - others).nan_to_num(nan=-4.0).tolist()
        order = sorted(self.scores.answered.nonzero().flatten().tolist(), key=lambda number: -margins[number])
        best, worst = order[:count], order[::-1][:count]
        return Examples(best=[self._example(one) for one in best], worst=[self._example(one) for one in worst])

    def _example(self, number: int) -> RetrievalExample:
        question, scores = self.questions.asked[number], self.scores
        cosines = scores.cosine[number, : len(question.texts)]
        nearest = cosines.sort(descending=True, stable=True).indices[:_NUM_TEXTS].tolist()
        return RetrievalExample(
            image=picture(self.questions.images.stored_image(question.image)),
            captions=[question.texts[0]],
            rank=len(question.texts) - int(scores.wins(scores.cosine)[number].sum()),
            retrieved=[Retrieved(question.texts[place], place == 0, float(cosines[place])) for place in nearest],
        )
