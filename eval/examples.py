"""The best and the worst retrievals of a model, as pictures with captions, in memory and in a run's folder."""

import hashlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from data.images.jpeg import reduction_to
from data.images.picture import Picture
from data.images.pillow import turned_upright
from vlm.atomic import write_bytes, write_text
from vlm.sealed import sealed_json

EXAMPLES_FILE = "examples.json"
_PICTURE = re.compile(r"(\d{3}|[0-9a-f]{16})\.jpg")
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

    def write(self, folder: Path) -> list[Path]:
        """Write the pictures, then `examples.json`, which names them, in place of earlier ones; other files stay."""
        folder.mkdir(parents=True, exist_ok=True)
        listing: dict[str, list[dict[str, Any]]] = {}
        for kind, examples in self._asdict().items():
            listing[kind] = []
            for example in examples:
                # Named by their content: what the old listing names stays as it is until the new one is there.
                name = f"{hashlib.blake2b(example.image, digest_size=8).hexdigest()}.jpg"
                write_bytes(folder / name, example.image)
                retrieved = [caption._asdict() for caption in example.retrieved]
                listing[kind].append({**example._asdict(), "image": name, "retrieved": retrieved})
        write_text(folder / EXAMPLES_FILE, sealed_json(listing))
        named = {example["image"] for examples in listing.values() for example in examples}
        for file in folder.iterdir():
            if _PICTURE.fullmatch(file.name) and file.name not in named:
                file.unlink()
        return [folder / name for name in (EXAMPLES_FILE, *sorted(named))]


def picture(stored: bytes) -> bytes:
    """A stored image as a JPEG for a page, upright, at most 384 pixels a side; a small JPEG stays as it is.

    Raises:
        BadSampleError: it is not whole.
    """
    decoded = Picture(stored)
    if decoded.format == "JPEG" and max(decoded.width, decoded.height) <= _LONGEST_SIDE:
        decoded.check()
        return stored
    reduction = reduction_to(decoded.width, decoded.height, _LONGEST_SIDE) if decoded.reducible else 1
    small = turned_upright(Image.fromarray(decoded.rgb(reduction)), decoded.orientation)
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=88)
    return written.getvalue()
