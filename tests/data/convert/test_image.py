"""Images go into shards untouched unless something was asked for, and then upright, no larger and no coarser."""

import io

import numpy as np
import pytest
from PIL import Image

from data.convert.image import prepare_image
from data.samples.bad_sample import BadSampleError
from tests.data.convert.pictures import encoded, picture


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("size", [None, 16, 100])
def test_a_small_enough_image_keeps_its_bytes(kind: str, suffix: str, size: int | None) -> None:
    stored = encoded(picture(1), kind)
    image = prepare_image(stored, size, None)
    assert (image.suffix, image.data, image.size) == (suffix, stored, (24, 16))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_shorter_side_gets_the_size_and_the_picture_stays_the_same(kind: str) -> None:
    wide = picture(2, (300, 200))
    image = prepare_image(encoded(wide, kind, quality=95), 50, None)
    assert opened(image.data).size == image.size == (75, 50)
    assert image.original_size == (300, 200)
    expected = np.asarray(wide.resize((75, 50), Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(np.asarray(opened(image.data).convert("RGB"), dtype=float) - expected).mean() < 2
    assert opened(prepare_image(encoded(picture(2, (200, 300)), kind), 50, None).data).size == (50, 75)


def test_png_is_resized_without_loss_of_transparency() -> None:
    image = prepare_image(encoded(picture(3, (60, 40), "RGBA"), "PNG"), 20, 50)
    assert (image.suffix, opened(image.data).mode) == ("png", "RGBA")


def test_quality_recodes_only_what_is_stored_finer() -> None:
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    fine, coarse = encoded(noisy, quality=95), encoded(noisy, quality=70)
    recoded = prepare_image(fine, None, 80)
    assert opened(recoded.data).quantization == opened(encoded(noisy, quality=80)).quantization  # type: ignore[attr-defined]
    assert len(recoded.data) < len(fine)
    assert prepare_image(coarse, None, 80).data == coarse
    assert prepare_image(recoded.data, None, 80).data == recoded.data
    from_png = prepare_image(encoded(noisy, "PNG"), None, 80)
    assert (from_png.suffix, opened(from_png.data).format) == ("jpg", "JPEG")


def test_quality_never_makes_an_image_larger() -> None:
    flat = encoded(Image.new("RGB", (400, 400)), "PNG")
    assert prepare_image(flat, None, 95).data == flat


def test_what_is_written_anew_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(4, (120, 80))
    stored = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes(), quality=95)
    kept = prepare_image(stored, None, None)
    assert (kept.data, kept.size) == (stored, (120, 80))
    image = prepare_image(stored, 40, None)
    assert image.size == opened(image.data).size == (60, 40)
    assert opened(image.data).getexif().get(0x0112, 1) == 1
    expected = np.asarray(upright.resize((60, 40), Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(np.asarray(opened(image.data), dtype=float) - expected).mean() < 3


def test_other_formats_become_png_or_jpeg() -> None:
    lossless = prepare_image(encoded(picture(5), "BMP"), None, None)
    assert lossless.suffix == "png"
    assert np.array_equal(np.asarray(opened(lossless.data)), np.asarray(picture(5)))
    assert prepare_image(encoded(picture(5), "BMP"), None, 90).suffix == "jpg"


def test_sixteen_bits_become_the_upper_eight_when_resized() -> None:
    deep = Image.fromarray(np.full((40, 60), 0x8012, dtype=np.uint16))
    image = prepare_image(encoded(deep, "PNG"), 20, None)
    assert np.unique(np.asarray(opened(image.data))).tolist() == [0x80]


def test_cmyk_is_resized_to_rgb() -> None:
    image = prepare_image(encoded(picture(6, (60, 40), "CMYK"), quality=95), 20, None)
    assert opened(image.data).mode == "RGB"


def test_the_colour_profile_is_kept() -> None:
    image = prepare_image(encoded(picture(6, (60, 40)), icc_profile=b"a profile"), 20, None)
    assert opened(image.data).info["icc_profile"] == b"a profile"


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (b"", "0 bytes"),
        (b"no image at all", "unknown format"),
        (encoded(picture(7, (200, 200)))[:-400], "Premature end"),
        (encoded(picture(7, (200, 200)), "PNG")[:-400], "cannot be decoded"),
    ],
)
@pytest.mark.parametrize("size", [None, 20])
def test_an_image_that_is_not_whole_is_refused(stored: bytes, reason: str, size: int | None) -> None:
    with pytest.raises(BadSampleError, match=reason):
        prepare_image(stored, size, None)


def test_an_image_of_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = encoded(picture(8, (40, 40)))
    monkeypatch.setattr("data.convert.image.MAX_PIXELS", 1000)
    with pytest.raises(BadSampleError, match="40 x 40 pixels, more than 1,000"):
        prepare_image(stored, None, None)
