"""Small photographs for tests of building shards, and a reader that is not ours."""

import gc
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Image.Image:
    """A smooth coloured image, different for each seed."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return rough.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_pictures(folder: Path, count: int, name: str = "{:03d}.jpg") -> list[str]:
    """Write `count` JPEGs below `folder`; returns their names."""
    names = [name.format(number) for number in range(count)]
    for number, one in enumerate(names):
        (folder / one).parent.mkdir(parents=True, exist_ok=True)
        (folder / one).write_bytes(encoded(picture(number)))
    return names


def read_shards(folder: Path) -> list[dict[str, Any]]:
    """All samples as webdataset itself reads them, with the json parsed."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its shards open
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        gc.collect()
    return [{**sample, "json": json.loads(sample["json"])} for sample in samples]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """Every shard's content by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
