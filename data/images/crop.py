"""Random crops: the box, its place in the stored image, and its resizing to the view's pixels in one pass."""

import logging
import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from data.images.jpeg import Reduction, reduction_to
from data.images.pillow import Pixels
from data.randomness import Draws
from vlm.model.image_spec import ImageSpec

_log = logging.getLogger(__name__)
_ATTEMPTS = 10
# Reduced pixels per pixel of the result, each way. A reduced image is sharper than an antialiased one right up to its
# limit, so the resize that follows must have something left to do: at 2 photographs keep 49 to 53 dB, at 1 hardly 40.
_OVERSAMPLING = 2
_SMALLEST = 8  # pixels; the decoder picks its factor by the size wanted, which below this names several
_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Box(NamedTuple):
    """A crop of an image, in pixels of its full size."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top


def random_crop(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Draws) -> Box:
    """The box of a random resized crop, drawn as torchvision's RandomResizedCrop draws it (Szegedy et al., 2015).

    `scale` bounds its share of the image's area, `ratio` its width over its height.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_ATTEMPTS):
        area = width * height * draws.uniform(*scale)
        aspect = math.exp(draws.uniform(low, high))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            top, left = draws.integer(height - down + 1), draws.integer(width - across + 1)
            return Box(left, top, left + across, top + down)
    across = min(width, max(1, round(height * ratio[1])))
    down = min(height, max(1, round(width / ratio[0])))
    left, top = (width - across) // 2, (height - down) // 2
    return Box(left, top, left + across, top + down)


def reduction_for(box: Box, size: int) -> Reduction:
    """The largest of 1, 2, 4 and 8 by which an image can be reduced and still resolve `size` pixels well in the box."""
    return reduction_to(box.width, box.height, _OVERSAMPLING * size) if size >= _SMALLEST else 1


def stored_box(box: Box, orientation: int, width: int, height: int) -> Box:
    """The box in the stored image of a box in the upright one, `width` x `height` pixels, of this EXIF orientation."""
    left, top, right, bottom = box
    if orientation >= 5:  # rows of the stored image are columns of the upright one
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return Box(left, top, right, bottom)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """The [channels, height, width] pixels of a stored image as EXIF wants them seen; a view, nothing is copied."""
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, :, ::-1]
    if orientation in (3, 4, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels.transpose(0, 2, 1) if orientation >= 5 else pixels


def on_grid(box: Box, reduction: int, width: int, height: int) -> Box:
    """The box moved by at most `reduction - 1` pixels, so that it begins at whole pixels of the reduced image.

    Pixel i of an image decoded at 1 / `reduction` covers pixels [reduction * i, reduction * (i + 1)) of the full one.
    The extent is kept: rounding that, or the corner of a box that stays, costs 7 dB and more.
    """
    left = min(round(box.left / reduction), (width - box.width) // reduction) * reduction
    top = min(round(box.top / reduction), (height - box.height) // reduction) * reduction
    return Box(left, top, left + box.width, top + box.height)


def resize_crop(pixels: Pixels, box: Box, reduction: int, spec: ImageSpec) -> Pixels:
    """The box of a full-size image, antialiased, as [3, size, size]; `pixels` [height, width, 3] are the reduced image.

    The box is `on_grid`; its extent may be a fraction of reduced pixels, which the scale of the one pass takes in.
    """
    window = pixels[
        box.top // reduction : -(-box.bottom // reduction), box.left // reduction : -(-box.right // reduction)
    ]
    across, down = box.width / reduction, box.height / reduction
    kernel = _kernel(spec.interpolation)
    if kernel is None:
        window_image, square = Image.fromarray(window), (spec.size, spec.size)
        window_image = window_image.resize(square, _PILLOW[spec.interpolation], box=(0, 0, across, down))
        return np.asarray(window_image).transpose(2, 0, 1)
    rows = torch.from_numpy(np.ascontiguousarray(window))
    height, width = window.shape[:2]
    # Channels last by its strides, also where a batch of one would leave that open: the fast path of the kernel.
    image = rows.as_strided((1, 3, height, width), (3 * height * width, 1, 3 * width, 3))
    resized: Pixels = kernel(image, [spec.size, spec.size], False, spec.size / down, spec.size / across)[0].numpy()
    return resized


@cache
def _kernel(interpolation: str) -> Any:
    """torch's antialiased resize of uint8 pixels, which takes the scales apart from the sizes; None if it has none."""
    kernel = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa", None)
    if kernel is None:
        _log.warning("this torch lacks the %s resize of uint8 images; Pillow's, slower, is used", interpolation)
    return kernel
