"""The continuously weighted contrastive loss: other pairs are positives by as much as a second embedding says."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.target_mean import FunctionTargets, target_sums

Source = Literal["image", "text", "teacher_image", "teacher_text"]


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
        teacher = {"teacher_image": "image", "teacher_text": "text"}.get(self.weights_from)
        return Needs(gathered=frozenset({"text"}), teacher_outputs=frozenset({teacher} if teacher else ()))

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:  # noqa: D102
        positive, of_images, of_texts = pairs.logits(pairs.logit_scale)
        losses = -(logsigmoid(positive - of_images) + logsigmoid(positive - of_texts))
        for mean in self._mean_logits(pairs, positive):
            losses = losses + (positive - mean)  # all columns have the pair's own denominator
        return pairs.share(losses / 2)

    def _mean_logits(self, pairs: Pairs, positive: Tensor) -> list[Tensor]:
        """In each weighted direction the weighted mean of each query's logits; the own pair has weight 1."""
        queries = self._weighing(pairs)
        targets = FunctionTargets(queries, pairs.ranks.gather_constant(queries), self._weights)
        sums = target_sums(
            pairs.image,
            pairs.gathered.text_columns,
            targets,
            pairs.gathered.other_samples,
            with_columns=self.direction != "image_to_text",
            product=pairs.exchange.product,
        )
        scale, means = pairs.logit_scale, []
        if self.direction != "text_to_image":
            means.append((positive + scale * sums.rows) / (1 + sums.row_totals))
        if self.direction != "image_to_text":
            over_images = pairs.ranks.sum_to_owners(torch.stack([sums.columns, sums.column_totals], 1))
            means.append((positive + scale * over_images[:, 0]) / (1 + over_images[:, 1]))
        return means

    def _weighing(self, pairs: Pairs) -> Tensor:
        source = pairs.teacher if self.weights_from.startswith("teacher") else pairs.outputs
        return source[self.weights_from.removeprefix("teacher_")].detach()

    def _weights(self, similarities: Tensor) -> Tensor:
        weights = similarities.add(1).mul_(0.5).clamp_(min=0)  # rounding may bring it below 0
        if self.sharpness != 1:
            weights.pow_(self.sharpness)
        return weights.masked_fill_(weights < self.threshold, 0) if self.threshold else weights
