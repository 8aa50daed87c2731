"""The contrastive loss of CLIP over the pairs of all ranks."""

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from vlm.batch import Batch
from vlm.encoded import Encoded
from vlm.objectives.registry import register
from vlm.objectives.term import Term
from vlm.similarity.gather import gather_pairs
from vlm.world import World


def clip_loss(
    image: Float[Tensor, "rows dim"],
    text: Float[Tensor, "rows dim"],
    logit_scale: Float[Tensor, "1"],
    world: World,
) -> Float[Tensor, ""]:
    """This rank's share of the symmetric InfoNCE loss (Radford et al., 2021, figure 3); scale a, N pairs in all.

    value = -1/(2N) sum_i [ log softmax_j(a <x_i, y_j>)_i + log softmax_j(a <y_i, x_j>)_i ], j over all N pairs.

    Each rank holds n = N / W rows and computes the n x N logits of its own images and of its own texts. The mean over
    its n rows is W / N times their sum: the share that `Term` asks for.
    """
    all_image, all_text = gather_pairs(image, text, world)
    own = torch.arange(len(image), device=image.device) + world.rank * len(image)
    image_logits = logit_scale * image @ all_text.T
    text_logits = logit_scale * text @ all_image.T
    return (F.cross_entropy(image_logits, own) + F.cross_entropy(text_logits, own)) / 2


@register("clip")
class Clip(Term):
    """The gathered CLIP loss: all pairs of the global batch are negatives of each other."""

    def __call__(self, encoded: Encoded, batch: Batch, world: World) -> Float[Tensor, ""]:  # noqa: D102, ARG002
        return clip_loss(encoded.image, encoded.text, encoded.logit_scale, world)
