"""Images with detail at all the scales that the hash looks at, as photographs have."""

import io

import numpy as np
from PIL import Image


def photo(number: int, size: tuple[int, int] = (300, 200)) -> Image.Image:
    """A random image, (width, height) = `size`, that differs for each number."""
    draws = np.random.default_rng(number)
    layers = [draws.integers(0, 256, (cells, cells, 3), dtype=np.uint8) for cells in (4, 16)]
    smooth = [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC), np.float64) for one in layers]
    return Image.fromarray(np.mean(smooth, axis=0).astype(np.uint8))


def stored(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
