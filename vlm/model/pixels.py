"""8-bit pixels as a network takes them: normalised, or as they are where its patch embedding can do that by itself."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.nn.functional import conv2d

_MIDDLE = 128  # whole numbers from -128 to 127 are exact in bf16


class Normalisation(nn.Module):
    """The normalisation of 8-bit pixels, in one pass over them."""

    factor: Tensor
    offset: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
        self.register_buffer("factor", (1 / (255 * stds)).float(), persistent=False)
        self.register_buffer("offset", (-means / stds).float(), persistent=False)

    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Values of mean 0 and deviation 1, where the channels have `mean` and `std` of values in [0, 1]."""
        return torch.addcmul(self.offset, images.to(self.factor.dtype), self.factor)


class CentredPixels(nn.Module):
    """8-bit pixels less 128, which a `PatchEmbedding` normalises: in bf16 under autocast, and still exact."""

    middle: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("middle", torch.tensor(float(_MIDDLE)), persistent=False)

    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Whole numbers from -128 to 127."""
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.middle.dtype
        return images.to(dtype).sub_(self.middle)


class PatchEmbedding(nn.Conv2d):
    """A convolution of centred pixels, with the weights of one of normalised pixels, whose values it gives.

    The normalisation is linear in each channel, and no zeros are padded: the channels' factors go into the weights and
    their offsets into the bias, every time, so that gradients are those of the weights themselves.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, convolution: nn.Conv2d, normalisation: Normalisation) -> None:
        kept = {name: getattr(convolution, name) for name in ("in_channels", "out_channels", "kernel_size", "stride")}
        super().__init__(**kept, bias=convolution.bias is not None, device="meta")
        self.weight, self.bias = convolution.weight, convolution.bias
        self.register_buffer("factor", normalisation.factor, persistent=False)
        self.register_buffer("offset", _MIDDLE * normalisation.factor + normalisation.offset, persistent=False)

    def forward(self, input: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels rows columns"]:
        """The patches' embeddings."""
        offset = (self.weight.sum((2, 3)) * self.offset.flatten()).sum(1)
        bias = offset if self.bias is None else offset + self.bias
        return conv2d(input, self.weight * self.factor, bias, self.stride)


def pixels_for(trunk: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """What makes the trunk's input of 8-bit images. A patch embedding that can normalise does so from here on."""
    normalisation = Normalisation(mean, std)
    place = _patch_embedding(trunk)
    if place is None:
        return normalisation
    parent, _, name = place.rpartition(".")
    setattr(trunk.get_submodule(parent), name, PatchEmbedding(trunk.get_submodule(place), normalisation))  # type: ignore[arg-type]
    return CentredPixels()


def _patch_embedding(trunk: nn.Module) -> str | None:
    """The name of the convolution that cuts images into patches, where it alone sees the pixels."""
    if type(trunk) is VisionTransformer:  # of a subclass nobody knows what else it does with them
        place = "conv1"
    elif type(trunk) is TimmModel and type(trunk.trunk) is TimmVisionTransformer:
        pads = getattr(trunk.get_submodule("trunk.patch_embed"), "dynamic_img_pad", False)
        place = "" if pads else "trunk.patch_embed.proj"
    else:
        place = ""
    convolution = trunk.get_submodule(place) if place else None
    if type(convolution) is not nn.Conv2d or convolution.in_channels != 3:
        return None
    is_plain = convolution.padding == (0, 0) and convolution.dilation == (1, 1) and convolution.groups == 1
    return place if is_plain else None
