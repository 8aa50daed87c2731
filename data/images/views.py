"""From a stored image file to the uint8 pixels of a training crop or an evaluation view."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data.images.augment import AugmentConfig, augmented
from data.images.crop import Box, on_grid, random_crop, reduction_for, resize_crop, stored_box, upright
from data.images.jpeg import Reduction
from data.images.picture import Picture
from data.images.pillow import MAX_PIXELS, Pixels, turned_upright
from data.randomness import Draws
from data.samples.bad_sample import BadSampleError
from vlm.model.image_spec import ImageSpec


class Region(NamedTuple):
    """The part of a stored image that a view is made from.

    `pixels` [height, width, 3] are the whole stored image at 1 / `reduction` of its size; `box` is the part, in
    full-size pixels of the image as stored, which is to be seen as its EXIF `orientation` says.
    """

    pixels: Pixels
    reduction: Reduction
    box: Box
    orientation: int


def training_view(
    stored: bytes, spec: ImageSpec, augment: AugmentConfig, key: tuple[int | str, ...], out: Pixels
) -> None:
    """Write a random resized crop as open_clip trains on, augmented, into `out`, [3, size, size] of any strides.

    Everything random is drawn from `key`: the pixels are the same in any process, and no global generator is touched.

    Raises:
        BadSampleError: the image cannot be decoded, or has more than `max_pixels`.
    """
    region = read_region(stored, spec, augment, key)
    view = upright(resize_crop(region.pixels, region.box, region.reduction, spec), region.orientation)
    if augment.flip and Draws("flip", *key).integer(2):
        view = view[:, :, ::-1]
    np.copyto(out, view)
    if augment.changes_pixels:
        image = torch.from_numpy(np.ascontiguousarray(view))
        np.copyto(out, augmented(image, augment, Draws("augment", *key)).numpy())


def read_region(stored: bytes, spec: ImageSpec, augment: AugmentConfig, key: tuple[int | str, ...]) -> Region:
    """Draw the crop and decode the image, no larger than the crop needs.

    A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8, unless the view shall be exact.

    Raises:
        BadSampleError: the image cannot be decoded, or has more than `max_pixels`.
    """
    picture = Picture(stored, max_pixels=augment.max_pixels)
    box = _crop(picture.width, picture.height, picture.orientation, augment, Draws("crop", *key))
    reduction = reduction_for(box, spec.size) if picture.reducible and not augment.exact else 1
    pixels = picture.rgb(reduction)
    return Region(pixels, reduction, on_grid(box, reduction, picture.width, picture.height), picture.orientation)


def _crop(width: int, height: int, orientation: int, augment: AugmentConfig, draws: Draws) -> Box:
    """A random box of the upright image, as it lies in the stored one."""
    size = (width, height) if orientation < 5 else (height, width)
    box = random_crop(*size, augment.crop_scale, augment.crop_ratio, draws)
    return stored_box(box, orientation, width, height)


def evaluation_view(stored: bytes, spec: ImageSpec, max_pixels: int = MAX_PIXELS, *, box: Box | None = None) -> Pixels:
    """The fixed view that open_clip's `image_transform(is_train=False)` makes of the RGB image, [size, size, 3].

    With a `box`, in pixels of the image as stored, of what lies in it alone.

    Raises:
        BadSampleError: the image cannot be decoded, has more than `max_pixels`, or nothing of it lies in the box.
    """
    picture = Picture(stored, max_pixels=max_pixels)
    whole = Image.fromarray(picture.rgb())
    image = turned_upright(whole if box is None else whole.crop(_inside(box, whole)), picture.orientation)
    width, height = resized(image.width, image.height, spec)
    if min(width, height) < 1:
        raise BadSampleError(f"its image of {image.width} x {image.height} pixels is too narrow to be resized")
    resampling = getattr(Image.Resampling, spec.interpolation.upper())
    if width * height <= max_pixels:
        return _centred(np.asarray(image.resize((width, height), resampling)), spec.size)
    # A sliver, of which only the middle is made.
    left, top = (round((extent - spec.size) / 2.0) for extent in (width, height))
    across, down = image.width / width, image.height / height
    middle = (left * across, top * down, (left + spec.size) * across, (top + spec.size) * down)
    return np.asarray(image.resize((spec.size, spec.size), resampling, box=middle))


def _inside(box: Box, image: Image.Image) -> Box:
    """The part of a box that lies in the image."""
    part = Box(max(0, box.left), max(0, box.top), min(image.width, box.right), min(image.height, box.bottom))
    if min(part.width, part.height) < 1:
        raise BadSampleError(f"its box {tuple(box)} lies outside its image of {image.width} x {image.height} pixels")
    return part


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
    short = [max(size - extent, 0) for extent in pixels.shape[:2]]
    if any(short):
        pixels = np.pad(pixels, [*((missing // 2, (missing + 1) // 2) for missing in short), (0, 0)])
    top, left = (round((extent - size) / 2.0) for extent in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]
