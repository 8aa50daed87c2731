"""What a picture must look like when it reaches the image tower."""

from typing import Literal

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from pydantic import Field, PositiveInt

from vlm.config import Config


class ImageSpec(Config):
    """Size, resizing and normalisation of the images of one model, with the meaning and the defaults of open_clip.

    The data side resizes and crops to `size` x `size` uint8 pixels; the image tower applies `mean` and `std` (of values
    scaled to [0, 1]) on its own device.
    """

    size: PositiveInt = 224
    mean: tuple[float, float, float] = Field(default=OPENAI_DATASET_MEAN)
    std: tuple[float, float, float] = Field(default=OPENAI_DATASET_STD)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash", "longest"] = "shortest"
