"""Counterfactual captions among the texts that images are compared with, and the terms' choice of them by editor."""

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.batch import COUNTERFACTUALS, Batch, Counterfactuals, editor_key
from vlm.errors import EveryRankError
from vlm.objectives.pairs import ExtraNegatives
from vlm.objectives.providers.extra_negatives import num_equal
from vlm.objectives.registry import PROVIDERS
from vlm.objectives.rows import Rows, RowSamples
from vlm.objectives.step import Between, PairStep, text_keys
from vlm.objectives.term import Needs, Provider
from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.log_sum_exp import row_log_sum_exp
from vlm.similarity.softplus_sum import softplus_sum

_TEXT = "text"


@PROVIDERS.register("counterfactual_negatives")
class CounterfactualNegatives(Provider):
    """The counterfactuals of all ranks as further texts that each image is compared with (NegCLIP).

    It serves terms between texts and another kind of rows. Each image sees those of all images, its own among them,
    which are the hardest; a counterfactual that reads as the caption of another image is no negative for that one. They
    learn as other texts do. Texts are compared with the images as before. (Yuksekgonul et al., When and Why
    Vision-Language Models Behave like Bags-of-Words, 2023.)
    """

    editors: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="editors whose counterfactuals they are, by name; null: all others"
    )
    besides: tuple[str, ...] = Field(default=(), description="editors that are left out where `editors` is null")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(
            outputs=frozenset({*self.between, COUNTERFACTUALS}), batch_parts=frozenset({"text", COUNTERFACTUALS})
        )

    def negatives(self, step: PairStep) -> ExtraNegatives:  # noqa: D102
        return FurtherTexts(step, of_editors(step.batch, self.editors, self.besides))


class FurtherTexts(ExtraNegatives):
    """The chosen counterfactuals of all ranks as columns beside the texts of a step's pairs, with their gradient.

    Raises EveryRankError for pairs without texts. Collective.
    """

    def __init__(self, step: PairStep, chosen: Bool[Tensor, " counterfactuals"]) -> None:
        texts, part, pairs = step.batch.texts, step.batch.parts[COUNTERFACTUALS], step.pairs
        require_texts((pairs.x_rows.kind, pairs.y_rows.kind))
        assert isinstance(part, Counterfactuals)
        owners = step.batch.owners(COUNTERFACTUALS)[chosen]
        samples = RowSamples(step.batch.sample_ids[owners], step.exchange)
        self._matmul_dtype = pairs.matmul_dtype
        self._columns = Rows(COUNTERFACTUALS, step.outputs[COUNTERFACTUALS][chosen], samples).columns
        own_texts = text_keys(texts.tokens, texts.lengths)
        index = pairs.x_rows.index
        if index is not None:
            own_texts = own_texts[step.batch.owners(pairs.x_rows.kind)[index]]
        keys = samples.ranks.gather_constant(text_keys(part.tokens[chosen], part.lengths[chosen]))
        self._keys = own_texts, keys
        self._other_texts = (EqualKeys(own_texts, keys),)

    def num_columns(self, others: str) -> Int64[Tensor, " rows"]:  # noqa: D102
        own_texts, keys = self._keys
        return len(keys) - num_equal(own_texts, keys) if others == _TEXT else torch.zeros_like(own_texts)

    def log_sum_exp(  # noqa: D102
        self, queries: Float[Tensor, "rows dim"], others: str, scale: Float[Tensor, " rows_or_1"]
    ) -> Float[Tensor, " rows"]:
        if others != _TEXT:
            return queries.new_full((len(queries),), float("-inf"))
        return row_log_sum_exp(queries, self._columns, scale, self._other_texts, matmul_dtype=self._matmul_dtype)

    def softplus_sum(  # noqa: D102
        self, queries: Float[Tensor, "rows dim"], others: str, scale: Float[Tensor, "1"], bias: Float[Tensor, "1"]
    ) -> Float[Tensor, " rows"]:
        if others != _TEXT:
            return queries.new_zeros(len(queries))
        return softplus_sum(queries, self._columns, scale, bias, self._other_texts, matmul_dtype=self._matmul_dtype)


def require_texts(between: Between) -> None:
    """Raise EveryRankError for kinds of rows none of which are the texts that counterfactuals are made from."""
    if _TEXT not in between:
        raise EveryRankError(f"between {' and '.join(between)}: counterfactuals are of texts; one of the two is text")


def of_editors(
    batch: Batch, editors: tuple[str, ...] | None, besides: tuple[str, ...] = ()
) -> Bool[Tensor, " counterfactuals"]:
    """Whether each counterfactual of a batch is by one of these editors; None: by any but those `besides`."""
    part = batch.parts[COUNTERFACTUALS]
    assert isinstance(part, Counterfactuals)
    names = besides if editors is None else editors
    keys = torch.tensor([editor_key(name) for name in names], dtype=torch.int64, device=part.editors.device)
    return torch.isin(part.editors, keys, invert=editors is None)
