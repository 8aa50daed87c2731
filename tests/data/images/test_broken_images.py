"""Any bytes: an image is used or its sample is bad, with the reason; nothing else is raised."""

import re
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.images.augment import AugmentConfig
from data.images.views import evaluation_view, training_view
from data.samples.bad_sample import BadSampleError
from tests.data.images.photographs import photograph, stored, with_orientation
from tests.data.small_shards import picture
from vlm.model.image_spec import ImageSpec

SPEC = ImageSpec(size=16)
PHOTOGRAPH = photograph((60, 44))
FILES = {
    "JPEG": stored(PHOTOGRAPH),
    "progressive": stored(PHOTOGRAPH, progressive=True),
    "oriented": stored(PHOTOGRAPH, exif=with_orientation(6)),
    "CMYK": stored(PHOTOGRAPH.convert("CMYK")),
    "PNG": stored(PHOTOGRAPH, "PNG"),
    "palette": stored(PHOTOGRAPH.quantize(9), "PNG", transparency=b"\x00"),
    "WEBP": stored(PHOTOGRAPH, "WEBP", exif=with_orientation(3)),
}


def train(data: bytes, augment: AugmentConfig | None = None) -> None:
    training_view(data, SPEC, augment or AugmentConfig(), (1,), np.zeros((3, 16, 16), np.uint8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "its image is empty (0 bytes)"),
        (b"no image at all", "its image cannot be decoded (unknown format)"),
        (b"GIF89a" + bytes(40), "its image cannot be decoded (unknown format)"),
        (picture(1)[:200], "its image cannot be decoded"),
        (FILES["PNG"][:-40], "its image cannot be decoded"),
        (FILES["WEBP"][:60], "its image cannot be decoded"),
        (b"\xff\xd8", "its image cannot be decoded"),
    ],
)
def test_broken_images_are_bad_samples_with_a_reason(data: bytes, reason: str) -> None:
    for use in (train, lambda data: evaluation_view(data, SPEC)):
        with pytest.raises(BadSampleError, match=re.escape(reason)):
            use(data)


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "palette"])
def test_a_cut_image_is_never_trained_on(kind: str) -> None:
    whole = FILES[kind]
    for share in np.linspace(0.05, 0.95, 19):
        with pytest.raises(BadSampleError, match="its image cannot be decoded"):
            train(whole[: int(len(whole) * share)])


def test_a_jpeg_that_ends_early_but_in_order_is_no_grey_area() -> None:
    whole = FILES["JPEG"]
    with pytest.raises(BadSampleError, match="remature end"):
        train(whole[: len(whole) // 2] + b"\xff\xd9")


def test_a_jpeg_with_harmless_extra_bytes_is_used() -> None:
    end = FILES["JPEG"].index(b"\xff\xdb")  # before the quantisation tables
    data = FILES["JPEG"][:end] + b"\x00\x00" + FILES["JPEG"][end:]
    expected, seen = (np.zeros((3, 16, 16), np.uint8) for _ in range(2))
    training_view(FILES["JPEG"], SPEC, AugmentConfig(), (1,), expected)
    training_view(data, SPEC, AugmentConfig(), (1,), seen)
    assert np.abs(seen.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", FILES)
def test_an_image_of_too_many_pixels_is_refused_by_its_header(kind: str) -> None:
    reason = re.escape("its image has 60 x 44 pixels, more than 2,639")
    for data in (FILES[kind], *([FILES[kind][:-20]] if kind != "WEBP" else [])):
        with pytest.raises(BadSampleError, match=reason):
            train(data, AugmentConfig(max_pixels=60 * 44 - 1))
        with pytest.raises(BadSampleError, match=reason):
            evaluation_view(data, SPEC, max_pixels=60 * 44 - 1)
    train(FILES[kind], AugmentConfig(max_pixels=60 * 44))


def test_a_bomb_beyond_what_pillow_opens_is_a_bad_sample() -> None:
    bomb = bytearray(FILES["PNG"])
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(BadSampleError, match="pixels"):
        train(bytes(bomb))


def _use(data: bytes) -> None:
    for use in (train, lambda data: evaluation_view(data, SPEC)):
        with suppress(BadSampleError):
            use(data)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x20\0\0\0WEBPVP8 "])
)
def test_random_bytes_raise_nothing_else(data: bytes, start: bytes) -> None:
    _use(start + data)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=6),
    st.floats(0, 1),
    st.booleans(),
)
def test_flipped_bits_and_cuts_raise_nothing_else(
    kind: str, flips: list[tuple[float, int]], end: float, cut: bool
) -> None:
    data = bytearray(FILES[kind])
    for place, bit in flips:
        data[int(place**2 * (len(data) - 1))] ^= 1 << bit  # more often in the header
    _use(bytes(data[: int(end * len(data))] if cut else data))
