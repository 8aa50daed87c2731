"""Damaged image files through every reader, beside Pillow: tracebacks, and files taken that Pillow refuses.

    python -P -m benchmarks.robustness.damaged_images [--files 10000] [--seed 0] [--work WORK] [--again]

Each file is a small picture in one of many forms with a flipped bit, a changed byte, a cut, a hole, a doubled piece or
bytes put in. Training, evaluation, `data check`, `data build` and the pictures of a report read it.
"""

import argparse
import io
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.result_cache import ResultCache, machine
from data.check.picture import picture_info
from data.convert.image import prepare_image
from data.images.augment import AugmentConfig
from data.images.picture import FORMATS, Picture
from data.images.views import evaluation_view, training_view
from data.samples.bad_sample import BadSampleError
from eval.examples import picture
from vlm.model.image_spec import ImageSpec

_PART = 1000
_SPEC = ImageSpec(size=32)
_OUT = np.zeros((3, 32, 32), np.uint8)
_ALL_FORMATS = (*FORMATS, "GIF", "BMP", "TIFF")
READERS: dict[str, Callable[[bytes], object]] = {
    "training": lambda data: training_view(data, _SPEC, AugmentConfig(), (1,), _OUT),
    "training, reduced": lambda data: training_view(data, ImageSpec(size=8), AugmentConfig(), (1,), _OUT[:, :8, :8]),
    "evaluation": lambda data: evaluation_view(data, _SPEC),
    "data check, filter": picture_info,
    "report": picture,
}
BUILDERS: dict[str, Callable[[bytes], object]] = {
    "data build": lambda data: prepare_image(data, None, None),
    "data build, smaller": lambda data: prepare_image(data, 24, 80),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="how many damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "damaged-images")
    parser.add_argument("--again", action="store_true", help="do not use what an earlier call measured")
    asked = parser.parse_args()
    results = ResultCache(asked.work, f"seed-{asked.seed}", asked.again)
    counts: Counter[str] = Counter()
    for part in range(0, asked.files, _PART):
        size = min(_PART, asked.files - part)
        counts.update(results(f"{part}+{size}", partial(_tried, asked.seed, part, size)))
    print(f"{machine()}; {sys.argv[0]} --files {asked.files} --seed {asked.seed}\n")
    print(
        "| form | files | Pillow refuses | refused | other pixels | taken nonetheless | verdicts differ | tracebacks |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for form in [*forms(), "all"]:
        row = [
            counts[f"{form}/{name}"] for name in ("files", "peer", "refused", "pixels", "taken", "differ", "traceback")
        ]
        print(f"| {form} | {' | '.join(f'{value:,}' for value in row)} |")


def _tried(seed: int, start: int, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    files = list(forms().items())
    for number in range(start, start + count):
        form, whole = files[number % len(files)]
        result = list(_compare(damaged(whole, random.Random(f"{seed} {number}"))))
        for where in (form, "all"):
            counts[f"{where}/files"] += 1
            for name in result:
                counts[f"{where}/{name}"] += 1
    return counts


def _compare(data: bytes) -> Iterator[str]:
    """The outcomes of one damaged file that are counted."""
    expected = peer(data)
    verdicts, broken = _verdicts(data, {**READERS, **BUILDERS} if _is_trained(data) else BUILDERS)
    if expected is None:
        yield "peer"
    if not all(verdicts):
        yield "refused"
    if any(verdicts) and expected is None:
        yield "taken"
    if len(set(verdicts)) > 1:
        yield "differ"
    if broken:
        yield "traceback"
    if all(verdicts) and expected is not None and not _same(data, expected):
        yield "pixels"


def _same(data: bytes, expected: NDArray[np.uint8]) -> bool:
    return np.array_equal(Picture(data, formats=_ALL_FORMATS).rgb(), expected)


def _is_trained(data: bytes) -> bool:
    """Whether the file calls itself one of the formats of shards."""
    return data.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF"))


def _verdicts(data: bytes, readers: dict[str, Callable[[bytes], object]]) -> tuple[list[bool], bool]:
    verdicts, broken = [], False
    for name, read in readers.items():
        try:
            read(data)
            verdicts.append(True)
        except BadSampleError:
            verdicts.append(False)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            verdicts.append(False)
            broken = True
    return verdicts, broken


def peer(data: bytes) -> NDArray[np.uint8] | None:
    """Pillow's own pixels; None where it refuses the file."""
    warnings.simplefilter("ignore")
    try:
        image = Image.open(io.BytesIO(data), formats=_ALL_FORMATS)
        image.load()
        return np.asarray(image.convert("RGB"))
    except Exception:
        return None


def forms() -> dict[str, bytes]:
    """A picture of 90 x 66 pixels as a file of each form, none of them with transparency."""
    rows, columns = np.mgrid[:66, :90]
    noise = np.random.default_rng(0).normal(0, 12, (66, 90, 3))
    waves = np.stack([128 + 90 * np.sin(columns / 9 + shift) * np.cos(rows / 7) for shift in (0, 1, 2)], -1)
    image = Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    return {
        "JPEG": _stored(image, "JPEG"),
        "JPEG, progressive": _stored(image, "JPEG", progressive=True),
        "JPEG, 4:4:4 with restarts": _stored(image, "JPEG", subsampling=0, restart_marker_blocks=3),
        "JPEG, EXIF and profile": _stored(image, "JPEG", exif=exif, icc_profile=bytes(200)),
        "JPEG, grey": _stored(image.convert("L"), "JPEG"),
        "JPEG, CMYK": _stored(image.convert("CMYK"), "JPEG"),
        "PNG": _stored(image, "PNG"),
        "PNG, EXIF": _stored(image, "PNG", exif=exif),
        "PNG, palette": _stored(image.quantize(16), "PNG"),
        "WebP": _stored(image, "WEBP"),
        "WebP, lossless": _stored(image, "WEBP", lossless=True, exif=exif),
        "GIF": _stored(image.quantize(64), "GIF"),
        "BMP": _stored(image, "BMP"),
        "TIFF": _stored(image, "TIFF"),
        "TIFF, LZW": _stored(image, "TIFF", compression="tiff_lzw"),
    }


def _stored(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """The file with one thing wrong; every third time within its first 700 bytes, where the headers are."""
    data = bytearray(whole)
    end = min(len(data), 700) if draw.random() < 1 / 3 else len(data)
    at, size = draw.randrange(end), draw.randrange(1, 40)
    match draw.choice(("bit", "bit", "byte", "cut", "hole", "missing", "twice", "added")):
        case "bit":
            data[at] ^= 1 << draw.randrange(8)
        case "byte":
            data[at] = draw.randrange(256)
        case "cut":
            del data[at:]
            if draw.random() < 0.5 and whole.startswith(b"\xff\xd8"):
                data += b"\xff\xd9"  # as if it were whole
        case "hole":
            data[at : at + size] = bytes(len(data[at : at + size]))
        case "missing":
            del data[at : at + size]
        case "twice":
            data[at:at] = data[at : at + size]
        case _:
            data[at:at] = draw.randbytes(size)
    return bytes(data)


if __name__ == "__main__":
    start = time.monotonic()
    main()
    print(f"\n{time.monotonic() - start:,.0f} s", file=sys.stderr)
