"""Pictures for the tests of images: photograph-like ones, stored in any form."""

import io
import math
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ORIENTATION = 0x0112


def stored(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    """The image as a file of that format."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photograph(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Random colours with the spectrum of natural images: amplitudes fall as 1 / frequency (Field, 1987)."""
    width, height = size
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    frequency[0, 0] = np.inf
    planes = [np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) / frequency, s=(height, width))]
    for _ in range(2):  # colours differ less, and more smoothly, than brightness
        colour = np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) / frequency**1.5, s=(height, width))
        planes.append(colour)
    light, *colours = (plane / plane.std() for plane in planes)
    channels = [light * 45 + 128 + 15 * colour for colour in (colours[0], -colours[0], colours[1])]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


def mosaic(shard: Path, size: tuple[int, int], tile: int, seed: int) -> Image.Image:
    """Real photographs side by side, enlarged to `tile` pixels each, with the noise of a camera."""
    random = np.random.default_rng(seed)
    with tarfile.open(shard) as files:
        names = [name for name in files.getnames() if name.endswith(".jpg")][:200]
        photographs = [Image.open(io.BytesIO(files.extractfile(name).read())) for name in names]  # type: ignore[union-attr]
    canvas = Image.new("RGB", size)
    for top in range(0, size[1], tile):
        for left in range(0, size[0], tile):
            one = photographs[random.integers(len(photographs))]
            canvas.paste(one.resize((tile, tile), Image.Resampling.BICUBIC), (left, top))
    noisy = np.asarray(canvas) + random.normal(0, 2, (size[1], size[0], 1))
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


def turned_back(upright: Image.Image, orientation: int) -> Image.Image:
    """How a camera stores the upright picture under each tag: the inverse of what the tag asks for."""
    turn = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]
    return upright if turn is None else upright.transpose(Image.Transpose(turn))


def with_orientation(orientation: int) -> Image.Exif:
    """Metadata that hold this orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def decibels(seen: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    """The peak signal to noise ratio of 8-bit pixels."""
    noise = np.mean((seen.astype(float) - expected) ** 2)
    return math.inf if noise == 0 else 10 * math.log10(255**2 / noise)
