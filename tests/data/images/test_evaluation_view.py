"""Evaluation views are open_clip's, and images of any colours, depth and orientation look as people expect."""

import io
import struct
import zlib

import numpy as np
import open_clip
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.images.augment import AugmentConfig
from data.images.crop import Box
from data.images.views import evaluation_view, read_region
from tests.data.images.photographs import photograph, stored, turned_back, with_orientation
from tests.data.images.test_training_view import WHOLE, view
from tests.data.small_shards import picture
from vlm.model.image_spec import ImageSpec

SIZES = [(50, 37), (37, 50), (64, 64), (21, 200), (333, 40), (16, 9), (1, 1), (301, 299)]


def spec(size: int = 32, **fields: str) -> ImageSpec:
    return ImageSpec.model_validate({"size": size, **fields})


def peer_view(image: Image.Image, view: ImageSpec) -> NDArray[np.uint8]:
    transform = open_clip.image_transform(
        view.size, False, (0.0,) * 3, (1.0,) * 3, resize_mode=view.resize_mode, interpolation=view.interpolation
    )
    pixels: NDArray[np.uint8] = (transform(image.convert("RGB")) * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_evaluation_is_open_clips_pixel_for_pixel(resize_mode: str, interpolation: str, size: tuple[int, int]) -> None:
    if resize_mode == "longest" and min(size) / max(size) * 32 < 0.5:
        pytest.skip("rounds to no pixel")
    for form in (spec(32, resize_mode=resize_mode, interpolation=interpolation), spec(33, resize_mode=resize_mode)):
        data = picture(3, size)
        expected = peer_view(Image.open(io.BytesIO(data)), form)
        assert np.array_equal(evaluation_view(data, form), expected)


def test_of_a_sliver_the_same_middle_is_made_without_the_rest() -> None:
    data = stored(photograph((3, 900)), "PNG")
    whole, middle = evaluation_view(data, spec()), evaluation_view(data, spec(), max_pixels=3000)
    assert np.abs(whole.astype(int) - middle).max() <= 1


PHOTOGRAPH = photograph((40, 40), seed=2)
GREY = PHOTOGRAPH.convert("L")
PALETTE = PHOTOGRAPH.quantize(16)
ALPHA = Image.fromarray((np.indices((40, 40)).sum(0) * 3).astype(np.uint8))


def over_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    """The sum a * colour + (1 - a) * 255, in floating point."""
    share = np.asarray(alpha, float)[:, :, None] / 255
    return Image.fromarray((np.asarray(image.convert("RGB")) * share + 255 * (1 - share)).round().astype(np.uint8))


def deep(form: str) -> tuple[bytes, Image.Image]:
    """A 16-bit PNG, and its 8 upper bits."""
    levels = np.asarray(GREY).astype(np.uint16) * 257
    if form == "grey":
        return stored(Image.fromarray(levels), "PNG"), GREY
    return _png_of_16_bits(np.asarray(PHOTOGRAPH)), PHOTOGRAPH


def _png_of_16_bits(pixels: NDArray[np.uint8]) -> bytes:
    """Pillow writes no 16-bit RGB, so by hand."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + (row.astype(np.uint16) * 257).astype(">u2").tobytes() for row in pixels)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(ALPHA)
    return image


def palette_over_white() -> Image.Image:
    """The palette image whose colours 0 and 1 are transparent and half transparent."""
    opacity = np.full(256, 255, np.uint8)
    opacity[:2] = (0, 128)
    return over_white(PALETTE, Image.fromarray(opacity[np.asarray(PALETTE)]))


FORMS: dict[str, tuple[bytes, Image.Image]] = {
    "grey PNG": (stored(GREY, "PNG"), GREY),
    "grey JPEG": (stored(GREY, "JPEG"), Image.open(io.BytesIO(stored(GREY, "JPEG")))),
    "one bit": (stored(GREY.convert("1"), "PNG"), GREY.convert("1")),
    "palette": (stored(PALETTE, "PNG"), PALETTE),
    "palette, transparent": (stored(PALETTE, "PNG", transparency=b"\x00\x80"), palette_over_white()),
    "grey with alpha": (stored(with_alpha(GREY), "PNG"), over_white(GREY, ALPHA)),
    "alpha": (stored(with_alpha(PHOTOGRAPH), "PNG"), over_white(PHOTOGRAPH, ALPHA)),
    "one transparent colour": (
        stored(GREY, "PNG", transparency=100),
        over_white(GREY, Image.fromarray(np.where(np.asarray(GREY) == 100, 0, 255).astype(np.uint8))),
    ),
    "WebP": (stored(PHOTOGRAPH, "WEBP", lossless=True), PHOTOGRAPH),
    "WebP with alpha": (
        stored(with_alpha(PHOTOGRAPH), "WEBP", lossless=True, exact=True),
        over_white(PHOTOGRAPH, ALPHA),
    ),
    "animated WebP": (
        stored(PHOTOGRAPH, "WEBP", lossless=True, save_all=True, append_images=[photograph((40, 40), seed=9)]),
        PHOTOGRAPH,
    ),
    "animated PNG": (
        stored(PHOTOGRAPH, "PNG", save_all=True, append_images=[photograph((40, 40), seed=9)]),
        PHOTOGRAPH,
    ),
    "16-bit grey": deep("grey"),
    "16-bit colours": deep("colours"),
    "CMYK JPEG": (
        stored(PHOTOGRAPH.convert("CMYK"), "JPEG"),
        Image.open(io.BytesIO(stored(PHOTOGRAPH.convert("CMYK"), "JPEG"))),
    ),
    "progressive JPEG": (
        stored(PHOTOGRAPH, "JPEG", progressive=True),
        Image.open(io.BytesIO(stored(PHOTOGRAPH, "JPEG", progressive=True))),
    ),
    "JPEG of RGB": (
        stored(PHOTOGRAPH, "JPEG", keep_rgb=True),
        Image.open(io.BytesIO(stored(PHOTOGRAPH, "JPEG", keep_rgb=True))),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_image_looks_as_expected(form: str) -> None:
    data, expected = FORMS[form]
    tolerance = 1 if "alpha" in form or "transparent" in form else 0
    assert np.abs(evaluation_view(data, spec()).astype(int) - peer_view(expected, spec())).max() <= tolerance
    box = read_region(data, spec(), WHOLE, (0,)).box
    part = np.asarray(expected.convert("RGB").crop(box).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(view(data, spec()).astype(int) - part).max() <= tolerance + 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    upright = photograph((48, 32))
    turned = turned_back(upright, orientation)
    data = stored(turned, form, exif=with_orientation(orientation), **({"lossless": True} if form == "WEBP" else {}))
    assert np.array_equal(evaluation_view(data, spec()), peer_view(upright, spec()))
    seen = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    for number in range(3):
        augment = AugmentConfig(crop_scale=(0.3, 0.6))
        plain = view(stored(Image.fromarray(seen), "PNG"), spec(), augment, number)
        # Rounding, since the passes change places; a shift by half a pixel would be 10 levels.
        assert np.abs(view(data, spec(), augment, number).astype(int) - plain).mean() < 0.3


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2), (7, 5), (9, 900)])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_tiny_and_narrow_images_are_used(size: tuple[int, int], form: str) -> None:
    data = stored(Image.new("RGB", size, (200, 100, 50)), form, quality=100)
    for seen in (view(data, spec()), evaluation_view(data, spec())):
        assert np.abs(seen.astype(int) - (200, 100, 50)).max() <= 4
    assert isinstance(read_region(data, spec(), WHOLE, (0,)).box, Box)
