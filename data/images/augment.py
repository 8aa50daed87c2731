"""The `augment` section of a recipe, and the changes of colour and shape that follow the crop of a training view."""

import math
from collections.abc import Callable
from functools import cache
from typing import Annotated

import torch
from jaxtyping import UInt8
from pydantic import Field, field_validator
from torch import Tensor
from torchvision.transforms import v2

from data.images.pillow import MAX_PIXELS
from data.randomness import Draws
from vlm.config import Config

Fraction = Annotated[float, Field(ge=0, le=1)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]
Jitter = Annotated[float, Field(ge=0, le=10)]
Sigma = Annotated[float, Field(ge=0.01, le=100)]
_BLUR_REACH = 3  # standard deviations


class RandAugmentConfig(Config):
    """RandAugment (Cubuk et al., 2020) with torchvision's operations."""

    num_ops: Annotated[int, Field(ge=1, le=100, description="Operations that each image goes through.")] = 2
    magnitude: Annotated[int, Field(ge=0, le=30, description="Strength of each operation, of 30.")] = 9


class AugmentConfig(Config):
    """The training views: a random resized crop, then what is switched on here, in the order of these fields.

    `color_jitter`, `color_jitter_prob` and `gray_scale_prob` mean what they mean in open_clip.
    """

    crop_scale: Annotated[
        tuple[Fraction, Fraction], Field(description="Least and greatest area of the crop, as shares of the image.")
    ] = (0.9, 1.0)
    crop_ratio: Annotated[
        tuple[Ratio, Ratio], Field(description="Least and greatest width / height of the crop, before it is squashed.")
    ] = (3 / 4, 4 / 3)
    flip: Annotated[bool, Field(description="Mirror every other view (captions naming sides no longer fit).")] = False
    rand_augment: Annotated[RandAugmentConfig | None, Field(description="Random operations of given strength.")] = None
    color_jitter: Annotated[
        tuple[Jitter, Jitter, Jitter, Fraction] | None,
        Field(description="Greatest change of brightness, contrast, saturation (shares) and hue (of the circle)."),
    ] = None
    color_jitter_prob: Annotated[Fraction, Field(description="Share of the views whose colours are jittered.")] = 0.8
    gray_scale_prob: Annotated[Fraction, Field(description="Share of the views that lose their colours.")] = 0.0
    blur_prob: Annotated[Fraction, Field(description="Share of the views that are blurred.")] = 0.0
    blur_sigma: Annotated[
        tuple[Sigma, Sigma], Field(description="Least and greatest standard deviation of the blur, in view pixels.")
    ] = (0.1, 2.0)
    exact: Annotated[
        bool, Field(description="Decode large JPEG files at full size: slower, pixels within rounding of Pillow's.")
    ] = False
    max_pixels: Annotated[
        int, Field(ge=1, le=2 * MAX_PIXELS, description="An image of more pixels (width x height) is a bad sample.")
    ] = MAX_PIXELS

    @field_validator("crop_scale")
    @classmethod
    def _is_a_range_of_fractions(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"found {scale}; give two shares of the image, 0 < low <= high <= 1")
        return scale

    @field_validator("crop_ratio", "blur_sigma")
    @classmethod
    def _is_a_positive_range(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0 < bounds[0] <= bounds[1]:
            raise ValueError(f"found {bounds}; give two numbers, 0 < low <= high")
        return bounds

    @field_validator("color_jitter")
    @classmethod
    def _is_a_jitter(cls, jitter: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if jitter is not None and (min(jitter) < 0 or jitter[3] > 0.5):
            raise ValueError(f"found {jitter}; give four changes of at least 0, the last (hue) at most 0.5")
        return jitter

    @property
    def changes_pixels(self) -> bool:
        """Whether anything but the crop and the flip is on."""
        jitters = self.color_jitter is not None and self.color_jitter_prob > 0
        return self.rand_augment is not None or jitters or self.gray_scale_prob > 0 or self.blur_prob > 0


def augmented(
    image: UInt8[Tensor, "3 size size"], augment: AugmentConfig, draws: Draws
) -> UInt8[Tensor, "3 size size"]:
    """The view after RandAugment, colour jitter, greying and blur, as far as they are on and drawn.

    torchvision draws from torch's global generator; it is seeded from `draws` meanwhile and put back, so that neither
    the view depends on the process nor the process on the view.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(draws.integer(2**63))  # torch.manual_seed would reseed GPUs, too
        return _transform(augment)(image)


@cache
def _transform(augment: AugmentConfig) -> Callable[[Tensor], Tensor]:
    steps: list[v2.Transform] = []
    if augment.rand_augment is not None:
        steps.append(v2.RandAugment(augment.rand_augment.num_ops, augment.rand_augment.magnitude))
    if augment.color_jitter is not None:
        steps.append(v2.RandomApply([v2.ColorJitter(*augment.color_jitter)], augment.color_jitter_prob))
    if augment.gray_scale_prob > 0:
        steps.append(v2.RandomGrayscale(augment.gray_scale_prob))
    if augment.blur_prob > 0:
        width = 2 * math.ceil(_BLUR_REACH * augment.blur_sigma[1]) + 1
        steps.append(v2.RandomApply([v2.GaussianBlur(width, augment.blur_sigma)], augment.blur_prob))
    transform: Callable[[Tensor], Tensor] = v2.Compose(steps)
    return transform
