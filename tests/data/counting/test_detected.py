"""The pictures that a detector is shown."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data.check.samples import OpenShard
from data.counting.detected import upright_pixels
from tests.data.small_shards import sample, write_shard


def test_they_stand_upright_as_people_see_them(tmp_path: Path) -> None:
    picture = Image.new("RGB", (48, 16))
    picture.paste((255, 255, 255), (0, 0, 24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right to be seen
    stored = io.BytesIO()
    picture.save(stored, "PNG", exif=exif)
    with OpenShard(str(write_shard(tmp_path / "one.tar", [sample(0, png=stored.getvalue())]))) as shard:
        (pixels,) = map(upright_pixels, shard)
    assert pixels.shape == (48, 16, 3)
    assert np.array_equal(pixels[:24], np.full((24, 16, 3), 255))
    assert not pixels[24:].any()
