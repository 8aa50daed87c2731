"""One differentiable exchange of embeddings between ranks."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_single_autograd

from vlm.world import World


def gather_pairs(
    image: Float[Tensor, "rows dim"], text: Float[Tensor, "rows dim"], world: World
) -> tuple[Float[Tensor, "global_rows dim"], Float[Tensor, "global_rows dim"]]:
    """Every rank's image and text rows, in rank order, in one collective that carries gradients.

    The backward sums over ranks what each of them has to say about a row (a reduce-scatter), so the gradient that
    reaches the local rows is that of the sum of all ranks' losses. All ranks must hold the same number of rows.
    """
    if world.size == 1:
        return image, text
    group = dist.group.WORLD
    assert group is not None
    both: Tensor = all_gather_single_autograd(torch.cat([image, text], dim=1), 0, group)
    all_image, all_text = both.split(image.shape[1], dim=1)
    return all_image, all_text
