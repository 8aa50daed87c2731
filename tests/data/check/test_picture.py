"""A picture is known again after re-encoding, and what cannot be decoded is refused."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from data.check.picture import NO_HASH, perceptual_hash, picture_info
from data.samples.bad_sample import BadSampleError
from tests.data.check.photos import photo, stored


def distance(one: bytes, other: bytes) -> int:
    return (picture_info(one).hash ^ picture_info(other).hash).bit_count()


def test_the_hash_is_the_median_cut_of_the_lowest_cosine_frequencies() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (4, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)

    def wave(frequency: int, place: int) -> float:
        return math.cos(math.pi * (2 * place + 1) * frequency / 64) * (math.sqrt(0.5) if frequency == 0 else 1)

    low = [
        math.fsum(int(grey[y, x]) * wave(u, y) * wave(v, x) for y in range(32) for x in range(32))
        for u in range(8)
        for v in range(8)
    ]
    middle = sorted(low[1:])[31]
    expected = "0" + "".join("1" if value > middle else "0" for value in low[1:])
    # On the median's own bit the two sums may differ by rounding.
    assert (perceptual_hash(grey) ^ int(expected, 2)).bit_count() <= 1


@pytest.mark.parametrize(
    "change",
    [
        lambda image: stored(image, quality=50),
        lambda image: stored(image, "PNG"),
        lambda image: stored(image, "WEBP", quality=60),
        lambda image: stored(image.resize((150, 100), Image.Resampling.LANCZOS)),
        lambda image: stored(image.resize((900, 600), Image.Resampling.BICUBIC)),
        lambda image: stored(image.convert("CMYK")),
        lambda image: stored(image.convert("L"), "PNG"),
        lambda image: stored(image.convert("RGBA"), "PNG"),
        lambda image: stored(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
    ],
)
def test_a_copy_in_another_form_is_within_four_bits(change: Callable[[Image.Image], bytes]) -> None:
    for number in range(10):
        image = photo(number)
        assert distance(stored(image, quality=90), change(image)) <= 4


def test_different_pictures_are_far_apart() -> None:
    hashes = [picture_info(stored(photo(number))).hash for number in range(60)]
    assert min((a ^ b).bit_count() for a in hashes for b in hashes if a is not b) > 8


def test_size_format_and_hash_are_of_the_upright_image() -> None:
    image = photo(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    turned = picture_info(stored(image.transpose(Image.Transpose.ROTATE_90), exif=exif))
    assert (turned.width, turned.height, turned.format, turned.mode) == (300, 200, "JPEG", "RGB")
    assert (turned.hash ^ picture_info(stored(image)).hash).bit_count() <= 4


def test_a_plain_image_has_no_hash() -> None:
    assert picture_info(stored(Image.new("RGB", (64, 64), (90, 120, 200)))).hash == NO_HASH
    assert picture_info(stored(photo(0))).hash != NO_HASH


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_is_cut_off_is_refused(form: str) -> None:
    whole = stored(photo(0), form)
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        picture_info(whole[: len(whole) * 2 // 3])


def test_foreign_bytes_and_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadSampleError, match="unknown format"):
        picture_info(b"no image at all")
    monkeypatch.setattr("data.check.picture.MAX_PIXELS", 59_999)
    with pytest.raises(BadSampleError, match="300 x 200 pixels"):
        picture_info(stored(photo(0)))
