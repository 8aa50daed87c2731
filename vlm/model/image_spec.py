"""The form in which a picture reaches the image tower."""

from typing import Annotated, Literal

from pydantic import Field

from vlm.config import Config

ImageSize = Annotated[int, Field(ge=8, le=4096)]
Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(ge=1e-3, le=10)]
Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "squash", "longest"]

# `OPENAI_DATASET_MEAN` and `_STD` of open_clip.constants, whose import takes seconds: the data side needs no model.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageSpec(Config):
    """Size, resizing and normalisation of the images of one model, with the meaning and the defaults of open_clip.

    The data side resizes and crops to `size` x `size` uint8 pixels; the image tower applies `mean` and `std` (of values
    scaled to [0, 1]) on its own device.
    """

    size: ImageSize = Field(default=224, description="pixels a side")
    mean: tuple[Mean, Mean, Mean] = Field(default=_MEAN, description="subtracted from values in [0, 1]")
    std: tuple[Std, Std, Std] = Field(default=_STD, description="by which they are divided then")
    interpolation: Interpolation = Field(default="bicubic", description="how images are resized")
    resize_mode: ResizeMode = Field(default="shortest", description="which side gets the size in evaluation")
