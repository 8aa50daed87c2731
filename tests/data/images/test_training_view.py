"""Training views: open_clip's pixels, also where a JPEG is decoded at a fraction of its size; drawn from the key."""

import io
import os
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.images import jpeg
from data.images.augment import AugmentConfig, RandAugmentConfig
from data.images.crop import Box
from data.images.views import read_region, training_view
from tests.data.images.photographs import decibels, mosaic, photograph, stored, turned_back, with_orientation
from vlm.model.image_spec import ImageSpec

WHOLE = AugmentConfig(crop_scale=(1.0, 1.0))
EVERYTHING = AugmentConfig(
    flip=True,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    gray_scale_prob=0.3,
    blur_prob=0.5,
    rand_augment=RandAugmentConfig(num_ops=2, magnitude=9),
)
SPEC = ImageSpec(size=32)


def view(data: bytes, spec: ImageSpec = SPEC, augment: AugmentConfig = WHOLE, *key: int | str) -> NDArray[np.uint8]:
    """The view as [size, size, 3]."""
    out = np.zeros((3, spec.size, spec.size), np.uint8)
    training_view(data, spec, augment, key or (0,), out)
    return out.transpose(1, 2, 0)


def full_size_pixels(data: bytes, box: Box, size: int) -> NDArray[np.uint8]:
    """open_clip's pixels of that box: Pillow decodes, crops and resizes at full size."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))


def fidelity(data: bytes, augment: AugmentConfig, count: int) -> tuple[float, set[int]]:
    """Mean PSNR of views at 224 pixels against open_clip's, and the reductions that made them."""
    ratios: list[float] = []
    reductions: set[int] = set()
    for number in range(count):
        region = read_region(data, ImageSpec(size=224), augment, (number,))
        expected = full_size_pixels(data, region.box, 224)
        ratios.append(decibels(view(data, ImageSpec(size=224), augment, number), expected))
        reductions.add(region.reduction)
    return float(np.mean(ratios)), reductions


@pytest.mark.parametrize(
    ("size", "reduction", "least"), [((400, 300), 1, 60), ((640, 480), 1, 60), ((1600, 1200), 2, 48)]
)
def test_views_of_photographs_are_open_clips(size: tuple[int, int], reduction: int, least: float) -> None:
    data = stored(photograph(size), quality=90)
    ratio, reductions = fidelity(data, AugmentConfig(), 3)
    assert reductions == {reduction}
    assert ratio > least


@pytest.mark.skipif("VLM_TEST_DATA" not in os.environ, reason="needs the real photographs")
@pytest.mark.parametrize(
    ("size", "tile", "least"), [((400, 300), 192, 60), ((640, 480), 256, 60), ((1600, 1200), 512, 50)]
)
def test_views_of_real_photographs_are_open_clips(size: tuple[int, int], tile: int, least: float) -> None:
    shard = Path(os.environ["VLM_TEST_DATA"]) / "flickr8k-test-000000.tar"
    for seed in range(3):
        assert fidelity(stored(mosaic(shard, size, tile, seed), quality=90), AugmentConfig(), 2)[0] > least


def test_an_exact_view_is_decoded_at_full_size() -> None:
    data = stored(photograph((1000, 800)), quality=90)
    for number in range(3):
        region = read_region(data, SPEC, AugmentConfig(exact=True), (number,))
        assert region.reduction == 1
        seen = view(data, SPEC, AugmentConfig(exact=True), number).astype(int)
        assert np.abs(seen - full_size_pixels(data, region.box, 32)).max() <= 1


@pytest.mark.parametrize("decoder", ["simplejpeg", "Pillow"])
@pytest.mark.parametrize(("size", "reduction"), [((301, 203), 2), ((601, 407), 4), ((1202, 813), 8)])
def test_reduced_views_keep_their_place_at_odd_sizes(
    size: tuple[int, int], reduction: int, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder == "Pillow":
        monkeypatch.setattr(jpeg, "fast_decoder", lambda: None)
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))  # a slope shows any shift, and no filter changes it
    slope = np.stack([x * 255 / size[0], y * 255 / size[1], (x + y) * 255 / sum(size)], -1)
    data = stored(Image.fromarray(slope.astype(np.uint8)), quality=98, subsampling=0)
    for number in range(5):
        augment = AugmentConfig(crop_scale=(0.75, 1.0))
        region = read_region(data, ImageSpec(size=40), augment, (number,))
        assert region.reduction == reduction
        expected = full_size_pixels(data, region.box, 40)
        seen = view(data, ImageSpec(size=40), augment, number)
        bias = (seen.astype(float) - expected)[1:-1, 1:-1].mean((0, 1))
        assert np.abs(bias).max() < 0.25  # of the 6 levels between neighbours


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(48, 36), (480, 360)])
def test_exif_orientation_is_applied(orientation: int, size: tuple[int, int]) -> None:
    seen = photograph(size, seed=3)
    data = stored(turned_back(seen, orientation), quality=98, subsampling=0, exif=with_orientation(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert jpeg.read_header(data) == (*Image.open(io.BytesIO(data)).size, orientation, "RGB")
    for number in range(4):
        augment = AugmentConfig(crop_scale=(0.3, 0.5), exact=True)
        same = view(stored(Image.fromarray(upright), "PNG"), SPEC, augment, number)
        # Rounding, since the passes change places; a shift by half a pixel would be 10 levels.
        assert np.abs(view(data, SPEC, augment, number).astype(int) - same).mean() < 0.3


def test_damaged_metadata_do_not_spoil_an_image() -> None:
    exif = bytearray(with_orientation(6).tobytes())
    exif[6:14] = b"\xff" * 8
    data = stored(photograph((48, 36)), exif=bytes(exif))
    assert np.array_equal(view(data), view(stored(photograph((48, 36)))))


def test_without_the_fast_decoder_pillow_gives_the_same_views(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [stored(photograph(size, seed=5)) for size in ((70, 50), (300, 200))]
    images.append(stored(photograph((70, 50)).convert("L")))
    fast = [view(data, SPEC, AugmentConfig(), 7) for data in images]
    monkeypatch.setattr(jpeg, "fast_decoder", lambda: None)
    for data, expected in zip(images, fast, strict=True):
        assert np.abs(view(data, SPEC, AugmentConfig(), 7).astype(int) - expected).max() <= 1


def test_a_missing_decoder_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(__import__("sys").modules, "simplejpeg", None)
    jpeg.fast_decoder.cache_clear()
    for number in range(3):
        view(stored(photograph((70, 50))), SPEC, AugmentConfig(), number)
    jpeg.fast_decoder.cache_clear()
    assert [record.message for record in caplog.records] == [
        "simplejpeg is not installed: Pillow decodes JPEG files, at about half the speed"
    ]


def test_the_view_is_written_into_the_buffer_and_nowhere_else() -> None:
    data = stored(photograph((70, 50)))
    batch = torch.full((3, 3, 32, 32), 7, dtype=torch.uint8)
    training_view(data, SPEC, EVERYTHING, ("a", 1), batch.numpy()[1])
    assert (batch[0] == 7).all()
    assert (batch[2] == 7).all()
    assert np.array_equal(batch[1].permute(1, 2, 0).numpy(), view(data, SPEC, EVERYTHING, "a", 1))
    last = torch.zeros(1, 3, 32, 32, dtype=torch.uint8).to(memory_format=torch.channels_last)
    training_view(data, SPEC, EVERYTHING, ("a", 1), last.numpy()[0])
    assert torch.equal(last[0], batch[1])


def test_flips_are_drawn_for_half_the_views() -> None:
    data, flipped = stored(photograph((50, 40))), 0
    for number in range(200):
        seen = view(data, SPEC, AugmentConfig(flip=True), "flip", number)
        plain = view(data, SPEC, AugmentConfig(), "flip", number)
        assert np.array_equal(seen, plain) or np.array_equal(seen, plain[:, ::-1])
        flipped += not np.array_equal(seen, plain)
    assert abs(flipped - 100) < 36  # five standard deviations


def _views(first: int) -> list[bytes]:
    data = stored(photograph((70, 50)))
    return [view(data, SPEC, EVERYTHING, "epoch", number).tobytes() for number in range(first, first + 4)]


def _views_and_generators() -> tuple[list[bytes], list[str]]:
    torch.manual_seed(99)
    before = _generators()
    views = _views(4) + _views(0)
    return views, [name for name, state in _generators().items() if state != before[name]]


def _generators() -> dict[str, str]:
    return {
        "torch": str(torch.get_rng_state().tolist()),
        "random": str(random.getstate()),
        "numpy": str(np.random.get_state(legacy=False)),
    }


def test_views_depend_on_the_key_alone_and_no_global_generator_on_the_views() -> None:
    here = _views(0) + _views(4)
    assert len(set(here)) == 8
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        elsewhere, moved = other.submit(_views_and_generators).result()
    assert elsewhere == here[4:] + here[:4]
    assert moved == []
