"""Shards of photographs at the sizes of web data, made from smaller ones, or from noise with a photograph's spectrum.

    python -P -m benchmarks.data.photographs FOLDER [--data DATA]

Small photographs (the jpg members of the tar shards in DATA) lie side by side, enlarged, under the noise of a camera. A
finished set is kept: its folder holds the shards and `done`.
"""

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

Size = tuple[int, int]
QUALITY = 90
NOISE = 2.0  # standard deviation of the brightness, of 255
MOST_PHOTOGRAPHS = 1_500
CAPTIONS = ("A brown dog runs through the tall grass with a stick .", "Two people walk along a beach at sunset .")


@dataclass(frozen=True)
class ShardSet:
    """The content of one set of shards: its images' sizes in turn, and how many are spread over how many shards."""

    name: str
    sizes: tuple[Size, ...]
    samples: int
    shards: int

    @property
    def title(self) -> str:
        """The sizes, for tables."""
        return " and ".join(f"{width}x{height}" for width, height in self.sizes)


SETS = (
    ShardSet("small", ((400, 300), (640, 480)), 1_024, 8),
    ShardSet("large", ((1600, 1200),), 256, 8),
)


@dataclass
class Photographs:
    """Draws pictures of any size and captions; the same for the same seed."""

    images: Sequence[Image.Image] = ()
    captions: Sequence[str] = CAPTIONS
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def draw(self, size: Size) -> bytes:
        """One JPEG file (quality 90, 4:2:0) of `size` = (width, height)."""
        pixels = self._mosaic(size) if self.images else self._spectrum(size)
        noise = self.random.standard_normal((size[1], size[0], 1), dtype=np.float32)
        pixels = (pixels + NOISE * noise).clip(0, 255).round().astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
        return file.getvalue()

    def caption(self) -> str:
        """One caption."""
        return self.captions[int(self.random.integers(len(self.captions)))]

    def _mosaic(self, size: Size) -> np.ndarray:
        """Photographs of two fifths of the width: small ones are enlarged more the larger the size is."""
        tile = round(size[0] * 0.4)
        canvas = Image.new("RGB", size)
        for top in range(0, size[1], tile):
            for left in range(0, size[0], tile):
                one = self.images[int(self.random.integers(len(self.images)))]
                canvas.paste(one.resize((tile, tile), Image.Resampling.BICUBIC), (left, top))
        return np.asarray(canvas, dtype=np.float32)

    def _spectrum(self, size: Size) -> np.ndarray:
        """Amplitudes fall as 1 / frequency, as natural images' do (Field, 1987); colours more steeply."""
        width, height = size
        frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
        frequency[0, 0] = np.inf
        planes = []
        for steepness, strength in ((1.0, 45.0), (1.5, 15.0), (1.5, 15.0)):
            waves = np.fft.rfft2(self.random.normal(size=(height, width))) / frequency**steepness
            plane = np.fft.irfft2(waves, s=(height, width))
            planes.append(strength * plane / plane.std())
        light, *colours = planes
        return np.stack([128 + light + colours[0], 128 + light - colours[0], 128 + light + colours[1]], -1)


def read_photographs(data: Path | None) -> Photographs:
    """The photographs and captions in the tar shards of a folder; pictures of noise where none is given."""
    if data is None:
        return Photographs()
    images, captions = [], []
    for shard in sorted(data.glob("*train*.tar")):
        for suffix, stored in _members(shard):
            if suffix == "jpg":
                images.append(Image.open(io.BytesIO(stored)).convert("RGB"))
            elif suffix == "json":
                captions += json.loads(stored).get("captions", [])
            elif suffix == "txt":
                captions.append(stored.decode().strip())
            if len(images) >= MOST_PHOTOGRAPHS:
                return Photographs(images, captions or CAPTIONS)
    if not images:
        sys.exit(f"{data} holds no *train*.tar with jpg members")
    return Photographs(images, captions or CAPTIONS)


def _members(shard: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield member.name.rpartition(".")[2], file.read()


def write_sets(folder: Path, data: Path | None) -> dict[str, Path]:
    """The folder of each set, written where it is not there yet."""
    folders = {one.name: folder / f"{one.name}-{one.samples}" for one in SETS}
    missing = [one for one in SETS if not (folders[one.name] / "done").exists()]
    photographs = read_photographs(data) if missing else Photographs()
    for one in missing:
        print(f"writing {one.samples} samples of {one.title} to {folders[one.name]}", file=sys.stderr)
        _write(one, folders[one.name], photographs)
    return folders


def _write(shards: ShardSet, folder: Path, photographs: Photographs) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    each = shards.samples // shards.shards
    for shard in range(shards.shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False) as writer:
            for number in range(shard * each, (shard + 1) * each):
                picture = photographs.draw(shards.sizes[number % len(shards.sizes)])
                writer.write({"__key__": f"{number:06d}", "jpg": picture, "txt": photographs.caption().encode()})
    (folder / "done").touch()


def main() -> None:
    """Write the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="folder with tar shards of photographs")
    arguments = parser.parse_args()
    write_sets(arguments.folder, arguments.data)


if __name__ == "__main__":
    main()
