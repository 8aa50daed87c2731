"""Patches of images that are left out in training, drawn on the device that the images are on."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from open_clip.timm_model import TimmModel
from open_clip.transformer import PatchDropout as OpenClipPatchDropout
from open_clip.transformer import VisionTransformer
from timm.layers.patch_dropout import PatchDropout as TimmPatchDropout
from timm.models import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn


class PatchDropout(nn.Module):
    """The share `prob` of an image's tokens, left out in training (FLIP: Li et al., 2023).

    Each image keeps as many, its own choice of them, any set as likely as any other; the first `num_prefix` tokens (a
    class token) are always kept. In evaluation nothing is left out. open_clip's own module draws on the CPU, and so
    waits for two copies to the device a forward; this one draws where the tokens are.
    """

    def __init__(self, prob: float, num_prefix: int) -> None:
        super().__init__()
        self.prob = prob
        self.num_prefix = num_prefix

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch kept width"]:
        """The tokens that are kept, in the order of their draws."""
        if not self.training or self.prob == 0:
            return tokens
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        num_kept = max(1, int(patches.shape[1] * (1 - self.prob)))
        draws = torch.rand(patches.shape[:2], device=patches.device)
        kept = draws.topk(num_kept, dim=1).indices
        # Not by [rows, kept]: the gradient of that sorts all places before it adds.
        patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
        return torch.cat([prefix, patches], 1)

    def extra_repr(self) -> str:
        """What it leaves out."""
        return f"prob={self.prob}, num_prefix={self.num_prefix}"


def use_own_patch_dropout(trunk: nn.Module) -> None:
    """Put our own module in the place of open_clip's, if the trunk is one of open_clip's ViTs that has it."""
    if isinstance(trunk, VisionTransformer) and type(trunk.patch_dropout) is OpenClipPatchDropout:
        old = trunk.patch_dropout
        trunk.patch_dropout = PatchDropout(old.prob, num_prefix=int(old.exclude_first_token))


def patch_dropout_of(trunk: nn.Module) -> float:
    """The share of patches that a trunk leaves out by itself; of several networks, the largest of theirs."""
    dropouts = (module for module in trunk.modules() if isinstance(module, PatchDropout | TimmPatchDropout))
    return max((float(dropout.prob) for dropout in dropouts), default=0.0)


def patch_dropouts(trunk: nn.Module) -> list[PatchDropout]:
    """What leaves out patches in a trunk, one a network; put where a network has room for it, or timm's own.

    Raises:
        ValueError: a network has no room for it; it is named.
    """
    return [_dropout_of(network) for network in networks_of(trunk)]


def networks_of(trunk: nn.Module) -> Iterator[nn.Module]:
    """The networks side by side in a trunk that joins several, by its method `networks`; else the trunk itself."""
    networks = getattr(trunk, "networks", None)
    if networks is None:
        yield trunk
    else:
        for network in networks():
            yield from networks_of(network)


def _dropout_of(network: nn.Module) -> PatchDropout:
    owner, name, num_prefix = network, "patch_dropout", 1
    if isinstance(network, TimmModel):
        owner, name = network.get_submodule("trunk"), "patch_drop"
        num_prefix = int(getattr(owner, "num_prefix_tokens", 1))
    # Of a subclass of timm's nobody knows whether its forward comes by there.
    if not isinstance(owner, VisionTransformer) and type(owner) is not TimmVisionTransformer:
        raise ValueError(f"a {type(owner).__name__} leaves out no patches; open_clip's and timm's VisionTransformer do")
    if type(getattr(owner, name)) in (nn.Identity, TimmPatchDropout):  # timm's draws on the tokens' device too
        setattr(owner, name, PatchDropout(0.0, num_prefix))
    found = getattr(owner, name)
    if not isinstance(found, PatchDropout):
        words = f"a {type(owner).__name__} leaves out patches in a way of its own ({type(found).__name__})"
        raise ValueError(words)  # noqa: TRY004 - the user's choice of a model, not ours of a type
    return found
