"""Moving the two clouds of embeddings together or apart (Liang et al., 2022, section 4.2)."""

from typing import Annotated

from jaxtyping import Float32
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

Shift = Annotated[float, Field(ge=-100, le=100)]


def moved_together(
    images: Float32[Tensor, "images dim"], texts: Float32[Tensor, "texts dim"], shift: float
) -> tuple[Float32[Tensor, "images dim"], Float32[Tensor, "texts dim"]]:
    """Every image moved by -shift/2 and every text by +shift/2 of the difference of the centroids, back to length 1.

    At 0 nothing moves, at 1 the centroids have met (before the lengths are mended), below 0 they move apart.
    """
    if shift == 0:
        return images, texts
    difference = shift / 2 * (images.mean(0) - texts.mean(0))
    return normalize(images - difference, dim=1), normalize(texts + difference, dim=1)
