"""The training view before `data.images.views`; the stream's next version does without."""

import numpy as np
from PIL import Image

from data.images.crop import Box, Pixels, random_crop
from data.images.pillow import MAX_PIXELS, foreign_bytes, open_image, orientation_of, rgb, turned_upright
from data.images.views import evaluation_view, resized, stack_pixels
from data.randomness import Draws
from vlm.model.image_spec import ImageSpec

__all__ = ["Box", "Pixels", "evaluation_view", "random_crop", "resized", "stack_pixels", "training_view"]
_RATIO = (3 / 4, 4 / 3)


def training_view(stored: bytes, spec: ImageSpec, crop_scale: tuple[float, float], flip: bool, draws: Draws) -> Pixels:
    """A random resized crop as open_clip trains on, [size, size, 3]: area within `crop_scale`, aspect ratio 3/4 to 4/3.

    Raises:
        BadSampleError: the image cannot be decoded.
    """
    with foreign_bytes():
        image = open_image(stored, MAX_PIXELS)
        orientation = orientation_of(image)
        width, height = image.size if orientation < 5 else image.size[::-1]
        box = random_crop(width, height, crop_scale, _RATIO, draws)
        reduction = min(box.width / spec.size, box.height / spec.size)
        if reduction >= 2:
            image.draft("RGB", (int(image.width / reduction), int(image.height / reduction)))
        image = turned_upright(rgb(image), orientation)
        across, down = image.width / width, image.height / height
        scaled = (box.left * across, box.top * down, box.right * across, box.bottom * down)
        resampling = getattr(Image.Resampling, spec.interpolation.upper())
        image = image.resize((spec.size, spec.size), resampling, box=scaled)
    if flip and draws.integer(2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)
