"""A learned query that pools the states of a text (COSMO: Wang et al., 2024)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlm.model.attention import Block, initialise_blocks


class TextQuery(nn.Module):
    """A learned query that attends to the states of a text's own tokens: attention, an MLP, and a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.block = Block(width, heads, 4.0, is_cross=True)
        self.norm = nn.LayerNorm(width)
        initialise_blocks([self.block], width, 1)

    def forward(
        self, states: Float[Tensor, "batch length width"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch width"]:
        """What the query becomes, text by text; what stands behind a text is not seen."""
        seen = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        query = self.query.expand(len(states), 1, -1)
        return self.norm(self.block(query, states, mask=seen[:, None]))[:, 0]  # type: ignore[no-any-return]
