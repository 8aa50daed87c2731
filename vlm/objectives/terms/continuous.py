"""The continuously weighted contrastive loss: other pairs are positives by as much as a second embedding says."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.soft_targets import FunctionTargets, target_sums

Source = Literal["image", "text", "teacher_image", "teacher_text"]
Direction = Literal["y_to_x", "x_to_y", "both"]
_DIRECTIONS: dict[str, Direction] = {"text_to_image": "y_to_x", "image_to_text": "x_to_y", "both": "both"}


@TERMS.register("continuous")
class Continuous(PairTerm):
    """CWCL (Srinivasa et al., 2023): in one direction each query has all columns as weighted positives.

    value = (L_weighted + L_plain) / 2, for texts that learn from images (`direction: text_to_image`):
    L_weighted = -1/N sum_i (1 / sum_j w_ij) sum_j w_ij log softmax_j(a <y_i, x_j>),  w_ij = ((<q_i, q_j> + 1) / 2)^k
    L_plain    = -1/N sum_i log softmax_i(a <x_i, y_i>)

    with a the logit scale. w_ii = 1 and the weights have no gradient. q are rows of unit length: the batch's own
    embeddings (of a locked tower: the paper's case, which has the images' tower locked) or those of the averaged
    weights. The paper adds the two losses: weight 2. Entries of the same sample do not count; providers' negatives join
    the denominators with a weight of 0.
    """

    takes_providers: ClassVar[bool] = True

    direction: Literal["text_to_image", "image_to_text", "both"] = Field(
        default="text_to_image", description="whose loss is weighted: queries to columns; the other one's is plain"
    )
    weights_from: Source = Field(default="image", description="the embeddings q that the weights compare")
    sharpness: float = Field(default=1.0, ge=0, le=1000, description="the power k of the weights; the paper's is 1")
    threshold: float = Field(default=0.0, ge=0, le=1, description="weights (after the power) below this are 0")

    def needs(self) -> Needs:  # noqa: D102
        x, y = self.between
        teacher = {"teacher_image": x, "teacher_text": y}.get(self.weights_from)
        return Needs(frozenset(self.between), frozenset({teacher} if teacher else ()), gathered=frozenset({y}))

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        rows = step.pairs.x_rows if self.weights_from.endswith("image") else step.pairs.y_rows
        queries = step.teacher_rows(rows) if self.weights_from.startswith("teacher") else rows.values.detach()
        return continuous(
            step.pairs,
            step.logit_scale,
            queries,
            direction=_DIRECTIONS[self.direction],
            sharpness=self.sharpness,
            threshold=self.threshold,
        )


def continuous(
    pairs: Pairs,
    scale: Float[Tensor, "1"],
    queries: Float[Tensor, "rows other"],
    *,
    direction: Direction = "y_to_x",
    sharpness: float = 1.0,
    threshold: float = 0.0,
) -> Float[Tensor, ""]:
    """The loss of `Continuous`, with weights from the similarities of `queries`: rows of length 1, without gradient."""
    positive, x_negatives, y_negatives = pairs.infonce_statistics(scale)
    losses = -(logsigmoid(positive - x_negatives) + logsigmoid(positive - y_negatives))

    def weights(similarities: Tensor) -> Tensor:
        weighed = similarities.add(1).mul_(0.5).clamp_(min=0)  # rounding may bring it below 0
        if sharpness != 1:
            weighed.pow_(sharpness)
        return weighed.masked_fill_(weighed < threshold, 0) if threshold else weighed

    targets = FunctionTargets(queries, pairs.ranks.gather_constant(queries), weights)
    sums = target_sums(
        pairs.x,
        pairs.y_columns,
        targets,
        pairs.other_samples,
        with_columns=direction != "x_to_y",
        matmul_dtype=pairs.matmul_dtype,
    )
    # In each weighted direction the weighted mean of each query's logits, the own pair having weight 1: all columns
    # have the pair's own denominator.
    if direction != "y_to_x":
        losses = losses + positive - (positive + scale * sums.rows) / (1 + sums.row_totals)
    if direction != "x_to_y":
        over_x = pairs.ranks.sum_to_owners(torch.stack([sums.columns, sums.column_totals], 1))
        losses = losses + positive - (positive + scale * over_x[:, 0]) / (1 + over_x[:, 1])
    return pairs.mean(losses / 2)
