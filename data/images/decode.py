"""From a stored image file to the uint8 pixels of a training crop or an evaluation view."""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.bad_sample import BadSampleError
from data.randomness import Draws
from vlm.model.image_spec import ImageSpec

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FORMATS = ("JPEG", "PNG", "WEBP")
_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10

Pixels = NDArray[np.uint8]


class Box(NamedTuple):
    """A crop in pixels of the upright full-size image; may be fractional after scaling."""

    left: float
    top: float
    right: float
    bottom: float


def training_view(stored: bytes, spec: ImageSpec, crop_scale: tuple[float, float], flip: bool, draws: Draws) -> Pixels:
    """A random resized crop as open_clip trains on, [size, size, 3]: area within `crop_scale`, aspect ratio 3/4 to 4/3.

    A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8, never below the resolution of the result; crop and
    resize are one antialiased pass.

    Raises:
        BadSampleError: the image cannot be decoded.
    """
    try:
        image = _open(stored)
        orientation = _orientation(image)
        width, height = image.size if orientation < 5 else image.size[::-1]
        box = random_crop(width, height, crop_scale, draws)
        reduction = min((box.right - box.left) / spec.size, (box.bottom - box.top) / spec.size)
        if reduction >= 2:
            image.draft("RGB", (int(image.width / reduction), int(image.height / reduction)))
        image = _upright_rgb(image, orientation)
        across, down = image.width / width, image.height / height
        scaled = Box(box.left * across, box.top * down, box.right * across, box.bottom * down)
        image = image.resize((spec.size, spec.size), _resampling(spec), box=scaled)
    except Exception as error:  # whatever a decoder raises on foreign bytes, the sample is bad
        raise _bad(error) from error
    if flip and draws.integer(2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def random_crop(width: int, height: int, scale: tuple[float, float], draws: Draws) -> Box:
    """The box of a random resized crop, drawn as torchvision's RandomResizedCrop draws it (Szegedy et al., 2015)."""
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * draws.uniform(*scale)
        ratio = math.exp(draws.uniform(math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            top, left = draws.integer(height - down + 1), draws.integer(width - across + 1)
            return Box(left, top, left + across, top + down)
    low, high = _CROP_RATIO
    across = min(width, max(1, round(height * high)))
    down = min(height, max(1, round(width / low)))
    left, top = (width - across) // 2, (height - down) // 2
    return Box(left, top, left + across, top + down)


def evaluation_view(stored: bytes, spec: ImageSpec) -> Pixels:
    """The fixed view that open_clip's `image_transform(is_train=False)` makes of the RGB image, [size, size, 3].

    Raises:
        BadSampleError: the image cannot be decoded.
    """
    try:
        image = _open(stored)
        image = _upright_rgb(image, _orientation(image))
        image = image.resize(resized(image.width, image.height, spec), _resampling(spec))
    except Exception as error:  # whatever a decoder raises on foreign bytes, the sample is bad
        raise _bad(error) from error
    return _centred(np.asarray(image), spec.size)


def resized(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """(width, height) after open_clip's resize, before the crop or the padding to a square."""
    if spec.resize_mode == "squash":
        return spec.size, spec.size
    if spec.resize_mode == "longest":
        ratio = max(width, height) / spec.size
        return round(width / ratio), round(height / ratio)
    if width <= height:
        return spec.size, int(spec.size * height / width)
    return int(spec.size * width / height), spec.size


def _centred(pixels: Pixels, size: int) -> Pixels:
    """Crop the middle, and pad with black where the image is too small (the odd row goes to the end)."""
    height, width = pixels.shape[:2]
    short = [max(0, size - height), max(0, size - width)]
    if any(short):
        pixels = np.pad(pixels, [*((missing // 2, (missing + 1) // 2) for missing in short), (0, 0)])
    top, left = (round((extent - size) / 2.0) for extent in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def stack_pixels(images: Sequence[Pixels]) -> UInt8[Tensor, "batch 3 size size"]:
    """One contiguous channels-first tensor from [size, size, 3] images, each copied once."""
    size = images[0].shape[0]
    batch = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    target = batch.numpy()
    for row, pixels in enumerate(images):
        target[row] = pixels.transpose(2, 0, 1)
    return batch


def _open(stored: bytes) -> Image.Image:
    if not stored:
        raise BadSampleError("its image is empty (0 bytes)")
    image = Image.open(io.BytesIO(stored), formats=_FORMATS)
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise BadSampleError(
            f"its image has {image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}"
        )
    return image


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _UPRIGHT else 1


def _upright_rgb(image: Image.Image, orientation: int) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without PIL's warning about transparent palettes
    if image.mode != "RGB":
        image = image.convert("RGB")
    image.load()
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _resampling(spec: ImageSpec) -> Image.Resampling:
    return Image.Resampling.BICUBIC if spec.interpolation == "bicubic" else Image.Resampling.BILINEAR


def _bad(error: Exception) -> BadSampleError:
    if isinstance(error, BadSampleError):
        return error
    text = "unknown format" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
    return BadSampleError(f"its image cannot be decoded ({text:.200})")
