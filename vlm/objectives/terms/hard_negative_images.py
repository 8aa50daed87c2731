"""Degraded copies of images as hard negatives: a caption is to be nearer to the image than to its worse copy."""

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.batch import DEGRADED, Batch, DegradedImages
from vlm.objectives.local_part import LocalPart
from vlm.objectives.registry import TERMS
from vlm.objectives.term import LocalTerm, Needs
from vlm.objectives.terms.two_way import ScaleChoice, scale_of, two_way
from vlm.outputs import PAIR


@TERMS.register("hard_negative_images")
class HardNegativeImages(LocalTerm):
    """The choice of each caption y_k between its image x_k and a degraded copy x'_k of it (`data.degraded`).

    value = 1/K sum_k w_k log(1 + exp(-a (<x_k, y_k> - <x'_k, y_k>)))

    over the K copies of the global batch, w_k being 1, or with `graded` the strength of the copy: what is hardly worse
    counts little. (After Wu et al., PCL-SR, 2021, who compare restored images with blurred ones; there is no text.)
    To be robust instead, take copies as positives: `{kind: clip, between: [degraded, text]}`.
    """

    scale: ScaleChoice = Field(
        default="none", description="factor of the cosines: none, logit_scale (as a constant), or a number"
    )
    graded: bool = Field(default=True, description="weigh each copy by its strength")

    def needs(self) -> Needs:
        """Both embeddings, and those of the copies."""
        return Needs(outputs=PAIR | {DEGRADED}, batch_parts=frozenset({DEGRADED}))

    def count(self, batch: Batch) -> int:
        """The degraded copies."""
        return len(batch.owners(DEGRADED))

    def __call__(self, part: LocalPart) -> Float[Tensor, ""]:
        """The sum over the copies of a micro-batch."""
        copies, owners = part.batch.parts[DEGRADED], part.batch.owners(DEGRADED)
        assert isinstance(copies, DegradedImages)
        image, text = part.outputs["image"][owners], part.outputs["text"][owners]
        positive, negative = (image * text).sum(1), (part.outputs[DEGRADED] * text).sum(1)
        losses = two_way(positive, negative, scale_of(self.scale, part.outputs))
        return (losses * copies.strengths.to(losses) if self.graded else losses).sum()
