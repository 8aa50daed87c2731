"""The base of evaluators that ask questions."""

from collections.abc import Mapping

from eval.choices.config import QuestionsConfig
from eval.choices.question import Questions
from eval.choices.scores import Reader, Scores
from eval.evaluator import EvaluationContext
from vlm.checkpoint.data_record import DataRecord
from vlm.errors import EveryRankError
from vlm.evaluation import Evaluator
from vlm.skip import Skip


class QuestionsEvaluator(Evaluator):
    """What evaluators of questions have in common: where these are from, and what could not be asked."""

    def __init__(
        self, config: QuestionsConfig, context: EvaluationContext, questions: Questions, *, decoder: bool = False
    ) -> None:
        self._questions = questions
        self._where = context.where("shards" if config.file is None else "file")
        self._reader = Reader(
            questions, context.tokenizer, batch_size=config.batch_size, workers=config.workers, decoder=decoder
        )

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines on what is not asked, and on what cannot be answered."""
        same = self._reader.num_same
        words = (
            f"{self._where}: in {same:,} of {len(self._questions.asked):,} questions the tokenizer makes the true text"
        )
        told = (f"{words} and a wrong one equal, or cuts them off where they differ: a miss",) if same else ()
        return (*self._questions.notices, *told)

    @property
    def records(self) -> Mapping[str, DataRecord]:
        """What is asked, and the images."""
        return self._questions.records

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """What was of no use so far, as far as this rank knows."""
        return self._questions.all_skipped

    def require_answers(self, scores: Scores) -> None:
        """Raise EveryRankError where no image could be read."""
        if not bool(scores.answered.any()):
            raise EveryRankError(
                f"{self._where}: none of the images of {len(self._questions.asked):,} questions can be read"
            )

    def counts(self, scores: Scores) -> dict[str, float]:
        """How much was asked, and what was not."""
        num_answered = int(scores.answered.sum())
        return {
            "num_samples": num_answered,
            "num_skipped": len(self._questions.asked) - num_answered + len(self._questions.skipped),
            "num_missing": self._questions.missing,
        }
