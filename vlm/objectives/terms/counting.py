"""Counting: the caption with the true number is to be nearer to the image than the one with another number."""

from collections.abc import Mapping

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.batch import COUNTERFACTUALS, Batch
from vlm.objectives.local_part import LocalPart
from vlm.objectives.providers.counterfactual_negatives import CounterfactualNegatives, of_editors
from vlm.objectives.registry import TERMS
from vlm.objectives.term import LocalTerm, Needs, Provider
from vlm.objectives.terms.two_way import ScaleChoice, scale_of, two_way
from vlm.outputs import PAIR


@TERMS.register("counting")
class Counting(LocalTerm):
    """The counting loss (Paiss et al., Teaching CLIP to Count to Ten, 2023, L_count).

    value = 1/K sum_k -log( exp(a <x_k, y_k>) / (exp(a <x_k, y_k>) + exp(a <x_k, y'_k>)) )

    over the K counterfactuals y'_k of the global batch, captions y_k in which the number is another one
    (`data.counterfactuals`), x_k being the image. A rank or step without any adds nothing. The paper has no scale a,
    weight 1, and 1/32 of the batch from a set whose captions count what is to be seen; with vectors of length 1 the
    difference of two cosines then moves little: at 0.05 the loss is 0.668, at a scale of 100 it is 0.0067. The
    counterfactuals are in no other loss, unless `as_negatives` shows them to the contrastive ones too.
    """

    scale: ScaleChoice = Field(
        default="none", description="factor of the cosines: none (the paper), logit_scale (as a constant), or a number"
    )
    editors: tuple[str, ...] = Field(
        default=("number",), min_length=1, description="editors whose counterfactuals count, by name"
    )
    as_negatives: bool = Field(
        default=False,
        description="also show them to terms that take providers (`clip`): further texts that images are compared with",
    )

    def needs(self) -> Needs:
        """Both embeddings, and those of the counterfactuals."""
        return Needs(outputs=PAIR | {COUNTERFACTUALS}, batch_parts=frozenset({COUNTERFACTUALS}))

    def provides(self) -> Mapping[str, Provider]:
        """The counterfactuals as further negatives, where that is wanted."""
        return {"as_negatives": CounterfactualNegatives(editors=self.editors)} if self.as_negatives else {}

    def count(self, batch: Batch) -> int:
        """The counterfactuals."""
        return int(of_editors(batch, self.editors).sum())

    def __call__(self, part: LocalPart) -> Float[Tensor, ""]:
        """The sum over the counterfactuals of a micro-batch."""
        chosen = of_editors(part.batch, self.editors)
        owners = part.batch.owners(COUNTERFACTUALS)[chosen]
        image, text = part.outputs["image"][owners], part.outputs["text"][owners]
        counterfactual = part.outputs[COUNTERFACTUALS][chosen]
        scale = scale_of(self.scale, part.outputs)
        return two_way((image * text).sum(1), (image * counterfactual).sum(1), scale).sum()
