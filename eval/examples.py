"""The best and the worst retrievals of a model, as pictures with captions, in memory and in a run's folder."""

import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

EXAMPLES_FILE = "examples.json"
_LONGEST_SIDE = 384


class Retrieved(NamedTuple):
    """A caption that an image found: whether it is one of its own, and the cosine of their embeddings."""

    text: str
    correct: bool
    score: float


class Example(NamedTuple):
    """An image (as JPEG), its true captions, the rank of the best of them, and the captions it found first."""

    image: bytes
    captions: list[str]
    rank: int
    retrieved: list[Retrieved]


class Examples(NamedTuple):
    """Images that found their captions best, and those that did worst."""

    best: list[Example]
    worst: list[Example]

    def write(self, folder: Path) -> None:
        """Write `examples.json` and its pictures into `folder`, replacing what was there once all is written."""
        aside = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        listing: dict[str, list[dict[str, Any]]] = {}
        number = 0
        for kind, examples in self._asdict().items():
            listing[kind] = []
            for example in examples:
                name = f"{number:03d}.jpg"
                (aside / name).write_bytes(example.image)
                retrieved = [found._asdict() for found in example.retrieved]
                listing[kind].append({**example._asdict(), "image": name, "retrieved": retrieved})
                number += 1
        (aside / EXAMPLES_FILE).write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def picture(stored: bytes) -> bytes:
    """A stored image as a JPEG for a page, at most 384 pixels a side; a small JPEG stays as it is."""
    with Image.open(io.BytesIO(stored)) as image:
        if image.format == "JPEG" and max(image.size) <= _LONGEST_SIDE:
            return stored
        small = image.convert("RGB")
        small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=88)
    return written.getvalue()
