"""Pixels: evaluation views are open_clip's, training crops are torchvision's distribution, odd files are handled."""

import io
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import crop

from data.bad_sample import BadSampleError
from data.images.decode import evaluation_view, random_crop, stack_pixels, training_view
from data.randomness import Draws
from tests.data.small_shards import picture
from vlm.model.image_spec import ImageSpec

SIZES = [(50, 37), (37, 50), (64, 64), (21, 200), (333, 40), (16, 9), (1, 1), (301, 299)]


def spec(size: int = 32, **fields: str) -> ImageSpec:
    return ImageSpec.model_validate({"size": size, **fields})


def peer_view(image: Image.Image, view: ImageSpec) -> np.ndarray:
    transform = open_clip.image_transform(
        view.size, False, (0.0,) * 3, (1.0,) * 3, resize_mode=view.resize_mode, interpolation=view.interpolation
    )
    return (transform(image.convert("RGB")) * 255).round().byte().permute(1, 2, 0).numpy()


def stored(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_evaluation_is_open_clips_pixel_for_pixel(resize_mode: str, interpolation: str, size: tuple[int, int]) -> None:
    if resize_mode == "longest" and min(size) / max(size) * 32 < 0.5:
        pytest.skip("rounds to no pixel")
    for view in (spec(32, resize_mode=resize_mode, interpolation=interpolation), spec(33, resize_mode=resize_mode)):
        data = picture(3, size)
        expected = peer_view(Image.open(io.BytesIO(data)), view)
        assert np.array_equal(evaluation_view(data, view), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_other_colour_modes_become_rgb_as_pil_converts(mode: str) -> None:
    image = Image.open(io.BytesIO(picture(1, (40, 40))))
    image = Image.fromarray(np.array(image.convert("L"), np.uint16)) if mode == "I;16" else image.convert(mode)
    data = stored(image, "JPEG" if mode == "CMYK" else "PNG", **({"transparency": b"\x00\x80"} if mode == "P" else {}))
    read = Image.open(io.BytesIO(data))
    # Through RGBA, PIL takes the palette's colours without a warning.
    expected = peer_view(read.convert("RGBA") if mode == "P" else read, spec())
    assert np.array_equal(evaluation_view(data, spec()), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.open(io.BytesIO(picture(1, (48, 32))))
    # How a camera would store the upright picture under each tag: the inverse of what the tag asks for.
    turns = [None, 0, 3, 1, 5, 2, 6, 4]
    turn = turns[orientation - 1]
    turned = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(turned, "PNG", exif=exif)
    assert np.array_equal(evaluation_view(data, spec()), peer_view(upright, spec()))
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))), np.asarray(upright))
    full = (1.0, 1.0)
    plain = training_view(stored(upright), spec(), full, False, Draws(1))
    assert np.array_equal(training_view(data, spec(), full, False, Draws(1)), plain)


def test_a_training_crop_is_pils_crop_and_resize() -> None:
    image = Image.open(io.BytesIO(picture(5, (90, 70))))
    for number in range(20):
        box = random_crop(90, 70, (0.3, 1.0), Draws(number))
        region = crop(image, int(box.top), int(box.left), int(box.bottom - box.top), int(box.right - box.left))
        expected = np.asarray(region.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
        seen = training_view(stored(image), spec(), (0.3, 1.0), False, Draws(number)).astype(int)
        # Reading from inside the image rather than from a cut-out, the outermost pixels see their true neighbours.
        assert np.abs(seen - expected)[2:-2, 2:-2].max() <= 1


def test_random_crops_have_torchvisions_distribution() -> None:
    scale, count = (0.2, 0.9), 4000
    size = (120, 80)
    blank = Image.new("RGB", size)
    ours = np.array([random_crop(*size, scale, Draws("distribution", n)) for n in range(count)])
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(count)], float)
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
    assert (ours[:, 0] >= 0).all()
    assert (ours[:, 2] <= size[0]).all()
    assert (ours[:, 3] <= size[1]).all()


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((9, 900), (0, 444, 9, 456))])
def test_an_image_too_narrow_for_any_crop_gives_its_middle(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert tuple(random_crop(*size, (0.9, 1.0), Draws(0))) == box


def test_scaled_decoding_stays_close_to_full_decoding(tmp_path: Path) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
    scaled = training_view(stored(image, "JPEG", quality=95), spec(64), (0.9, 1.0), False, Draws(1))
    full = training_view(
        stored(Image.open(io.BytesIO(stored(image, "JPEG", quality=95)))), spec(64), (0.9, 1.0), False, Draws(1)
    )
    noise = np.mean((scaled.astype(float) - full) ** 2)
    assert noise > 0  # it was scaled
    assert 10 * math.log10(255**2 / noise) > 40


def test_flips_are_drawn_for_half_the_visits() -> None:
    data = picture(1)
    plain = training_view(data, spec(), (1.0, 1.0), False, Draws(0))
    flipped = 0
    for number in range(200):
        view = training_view(data, spec(), (1.0, 1.0), True, Draws("flip", number))
        unflipped = training_view(data, spec(), (1.0, 1.0), False, Draws("flip", number))
        assert np.array_equal(view, unflipped) or np.array_equal(view, unflipped[:, ::-1])
        flipped += not np.array_equal(view, unflipped)
    assert plain.shape == (32, 32, 3)
    assert abs(flipped - 100) < 5 * math.sqrt(50)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no image at all", "unknown format"),
        (picture(1)[:200], "cannot be decoded"),
        (picture(1, form="PNG")[:-40], "cannot be decoded"),
        (picture(1, form="WEBP")[:60], "cannot be decoded"),
        (b"GIF89a" + bytes(40), "unknown format"),
    ],
)
def test_broken_images_are_bad_samples_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason):
        evaluation_view(data, spec())
    with pytest.raises(BadSampleError, match=reason):
        training_view(data, spec(), (0.9, 1.0), True, Draws(0))


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_a_decompression_bomb_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(40 * 32 / factor))
    with pytest.raises(BadSampleError, match="pixels"):
        evaluation_view(picture(1), spec())


def test_stacked_pixels_are_channels_first() -> None:
    views = [evaluation_view(picture(n), spec(16)) for n in range(3)]
    batch = stack_pixels(views)
    assert batch.shape == (3, 3, 16, 16)
    assert batch.is_contiguous()
    assert np.array_equal(batch.numpy()[2, 1], views[2][:, :, 1])
