"""Every reader of images takes the same files: none that Pillow refuses, each with Pillow's pixels."""

import io
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data.check.picture import picture_info
from data.convert.image import prepare_image
from data.images import jpeg
from data.images.augment import AugmentConfig
from data.images.picture import FORMATS, Picture
from data.images.views import evaluation_view, training_view
from data.samples.bad_sample import BadSampleError
from eval.examples import picture
from tests.data.images.photographs import photograph, stored, with_orientation
from vlm.model.image_spec import ImageSpec

ALL_FORMATS = (*FORMATS, "GIF", "BMP", "TIFF")
PHOTOGRAPH = photograph((60, 44))
RESTARTS = stored(PHOTOGRAPH, restart_marker_blocks=2)
TRAINED = {
    "JPEG": stored(PHOTOGRAPH),
    "progressive": stored(PHOTOGRAPH, progressive=True),
    "restarts": RESTARTS,
    "EXIF": stored(PHOTOGRAPH, exif=with_orientation(6), icc_profile=bytes(99)),
    "grey": stored(PHOTOGRAPH.convert("L")),
    "CMYK": stored(PHOTOGRAPH.convert("CMYK")),
    "PNG": stored(PHOTOGRAPH, "PNG"),
    "PNG with EXIF": stored(PHOTOGRAPH, "PNG", exif=with_orientation(3)),
    "WEBP": stored(PHOTOGRAPH, "WEBP"),
}
BUILT = {
    "GIF": stored(PHOTOGRAPH.quantize(64), "GIF"),
    "BMP": stored(PHOTOGRAPH, "BMP"),
    "TIFF": stored(PHOTOGRAPH, "TIFF"),
}


def train(data: bytes, size: int) -> None:
    training_view(data, ImageSpec(size=size), AugmentConfig(), (1,), np.zeros((3, size, size), np.uint8))


BUILDS: dict[str, Callable[[bytes], object]] = {
    "data build": lambda data: prepare_image(data, None, None),
    "data build, smaller": lambda data: prepare_image(data, 16, 60),
}
READERS: dict[str, Callable[[bytes], object]] = {
    "training": lambda data: train(data, 32),
    "training, reduced": lambda data: train(data, 8),
    "evaluation": lambda data: evaluation_view(data, ImageSpec(size=16)),
    "data check": picture_info,
    "report": picture,
}


def pillows(data: bytes) -> NDArray[np.uint8] | None:
    """Pillow's pixels of the whole file; None where it refuses it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=ALL_FORMATS)
            image.load()
            return np.asarray(image.convert("RGB"))
    except Exception:
        return None


def takes(read: Callable[[bytes], object], data: bytes) -> bool:
    """Whether the file is used; anything but a bad sample is an error of ours."""
    try:
        read(data)
    except BadSampleError:
        return False
    return True


def damaged(whole: bytes, count: int) -> list[bytes]:
    """Copies with one flipped bit, a quarter of them in the header; every sixth is cut instead."""
    draw = random.Random(len(whole))
    files = []
    for number in range(count):
        place = draw.randrange(len(whole) if number % 4 else len(whole) // 5)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        files.append(whole[:place] if number % 6 == 5 else bytes(flipped))
    return files


@pytest.mark.parametrize("form", [*TRAINED, *BUILT])
def test_all_readers_take_the_same_damaged_files_and_none_that_pillow_refuses(form: str) -> None:
    whole = {**TRAINED, **BUILT}[form]
    readers = BUILDS | READERS if form in TRAINED else BUILDS
    taken = 0
    for data in [whole, *damaged(whole, 60)]:
        expected = pillows(data)
        verdicts = {name: takes(read, data) for name, read in readers.items()}
        assert len(set(verdicts.values())) == 1, verdicts
        if verdicts["data build"]:
            assert expected is not None
            assert np.array_equal(Picture(data, formats=ALL_FORMATS).rgb(), expected)
            taken += 1
        elif data is whole:
            pytest.fail("the whole file is refused")
    assert 1 <= taken < 61  # both verdicts were seen


def test_a_damaged_png_is_never_taken_for_a_black_one() -> None:
    whole = TRAINED["PNG"]
    start, end = whole.index(b"IDAT") + 4, whole.index(b"IEND") - 8
    refused = [place for place in range(start, end, (end - start) // 40) if pillows(flip(whole, place)) is None]
    assert len(refused) > 30
    for place in refused:
        assert not any(takes(read, flip(whole, place)) for read in (BUILDS | READERS).values())


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (TRAINED["JPEG"][:-200] + b"\xff\xd9", "premature end of data segment"),
        (TRAINED["CMYK"][:-200] + b"\xff\xd9", "premature end of data segment"),
        (TRAINED["JPEG"][:-200], "Premature end"),
        (RESTARTS.replace(b"\xff\xd2", b"\xff\xd5", 1), "instead of RST"),
    ],
)
def test_a_jpeg_of_which_a_part_is_unknown_is_refused_by_all_though_pillow_fills_it_up(
    data: bytes, reason: str
) -> None:
    for read in (BUILDS | READERS).values():
        with pytest.raises(BadSampleError, match=reason):
            read(data)


@pytest.mark.parametrize("form", ["JPEG", "progressive", "grey", "CMYK"])
def test_a_jpeg_that_lacks_its_last_marker_is_refused_by_all_as_pillow_does(form: str) -> None:
    data = TRAINED[form].removesuffix(b"\xff\xd9")
    assert pillows(data) is None
    assert not any(takes(read, data) for read in (BUILDS | READERS).values())


@pytest.mark.parametrize("header", [b"ICC_PROFILE\0", b"JFIF\0", b"Adobe"])
def test_a_segment_that_only_pillow_reads_is_refused_by_all_where_it_refuses_it(header: bytes) -> None:
    marker = {b"I": 0xE2, b"J": 0xE0, b"A": 0xEE}[header[:1]]
    segment = bytes([0xFF, marker, 0, len(header) + 2]) + header
    data = TRAINED["JPEG"][:2] + segment + TRAINED["JPEG"][2:]
    assert {takes(read, data) for read in (BUILDS | READERS).values()} == {pillows(data) is not None}


def test_colours_that_the_fast_decoder_has_no_name_for_are_left_to_pillow() -> None:
    data = TRAINED["JPEG"]
    components = data.index(b"\xff\xc0") + 9
    two = data[:components] + b"\x02" + data[components + 1 :]
    assert jpeg.read_header(two) is None
    assert not any(takes(read, two) for read in (BUILDS | READERS).values())


def test_metadata_are_asked_for_only_once_the_pixels_are_there() -> None:
    exif = with_orientation(6)
    whole = stored(PHOTOGRAPH, "PNG", exif=exif)
    at = whole.index(b"eXIf") - 4
    size = 12 + int.from_bytes(whole[at : at + 4], "big")
    end = whole.index(b"IEND") - 4
    behind = whole[:at] + whole[at + size : end] + whole[at : at + size] + whole[end:]
    assert Picture(behind).orientation == 6
    assert np.array_equal(evaluation_view(behind, ImageSpec(size=16)), evaluation_view(whole, ImageSpec(size=16)))
