"""Crops: torchvision's distribution, and the pixels that Pillow's crop and resize give at full size."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from data.images import crop
from data.images.crop import Box, on_grid, random_crop, resize_crop, stored_box, upright
from data.randomness import Draws
from tests.data.images.photographs import photograph, stored, turned_back, with_orientation
from vlm.model.image_spec import ImageSpec

RATIO = (3 / 4, 4 / 3)


@pytest.mark.parametrize("ratio", [RATIO, (1.0, 1.5)])
def test_random_crops_have_torchvisions_distribution(ratio: tuple[float, float]) -> None:
    scale, count = (0.2, 0.9), 4000
    size = (120, 80)
    blank = Image.new("RGB", size)
    ours = np.array([random_crop(*size, scale, ratio, Draws("distribution", n)) for n in range(count)])
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(count)], float)
    top, left, height, width = theirs.T
    pairs = [
        (ours[:, 0], left),
        (ours[:, 1], top),
        (ours[:, 2] - ours[:, 0], width),
        (ours[:, 3] - ours[:, 1], height),
    ]
    for mine, other in pairs:
        deviation = math.sqrt((mine.var() + other.var()) / count)
        assert abs(mine.mean() - other.mean()) < 5 * deviation
        assert abs(mine.std() / other.std() - 1) < 0.08
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] <= size).all()


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((9, 900), (0, 444, 9, 456))])
def test_an_image_too_narrow_for_any_crop_gives_its_middle(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert tuple(random_crop(*size, (0.9, 1.0), RATIO, Draws(0))) == box


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kernel", ["torch's", "Pillow's"])
def test_a_resized_crop_is_pils_to_the_rounding(
    interpolation: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "Pillow's":  # as where torch has no such kernel
        monkeypatch.setattr(crop, "_kernel", lambda interpolation: None)
    image = photograph((90, 70))
    view = ImageSpec.model_validate({"size": 32, "interpolation": interpolation})
    for number in range(20):
        box = random_crop(90, 70, (0.1, 1.0), RATIO, Draws(number))
        expected = image.crop(box).resize((32, 32), Image.Resampling[interpolation.upper()])
        seen = resize_crop(np.array(image), box, 1, view)
        difference = np.abs(seen.transpose(1, 2, 0).astype(int) - np.asarray(expected))
        # Pillow may take the columns first, and both round in between.
        assert difference.max() <= 2
        assert difference.mean() < 0.3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_and_pixels_of_the_stored_image_are_what_exif_wants_seen(orientation: int) -> None:
    seen = photograph((48, 32))
    image = turned_back(seen, orientation)
    tagged = Image.open(io.BytesIO(stored(image, "PNG", exif=with_orientation(orientation))))
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(tagged)), np.asarray(seen))  # the premise
    box = Box(5, 7, 25, 19)
    part = image.crop(stored_box(box, orientation, *image.size))
    turned = upright(np.asarray(part).transpose(2, 0, 1), orientation)
    assert np.array_equal(turned.transpose(1, 2, 0), np.asarray(seen.crop(box)))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_box_moves_to_the_grid_of_the_reduced_image_and_keeps_its_extent(reduction: int) -> None:
    width, height = 301, 203
    for number in range(300):
        box = random_crop(width, height, (0.3, 1.0), RATIO, Draws(number))
        moved = on_grid(box, reduction, width, height)
        assert (moved.width, moved.height) == (box.width, box.height)
        assert moved.left % reduction == moved.top % reduction == 0
        assert moved.left >= 0
        assert moved.top >= 0
        assert moved.right <= width
        assert moved.bottom <= height
        assert max(abs(moved.left - box.left), abs(moved.top - box.top)) < reduction
