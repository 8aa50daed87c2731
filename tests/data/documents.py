"""Shards of interleaved documents for the tests."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from tests.data.small_shards import write_shard

Stored = dict[str, bytes | str | int]


def colour(number: int, place: int) -> tuple[int, int, int]:
    """The one colour of an image of a document."""
    return 5 * number % 256, 40 * place, 7


def plain_picture(number: int, place: int) -> bytes:
    """An image of a document: one colour, so that each crop of it is known."""
    stored = io.BytesIO()
    Image.new("RGB", (20, 18), colour(number, place)).save(stored, "PNG")
    return stored.getvalue()


def num_images(number: int) -> int:
    """How many images document `number` has: one to three."""
    return 1 + number % 3


def text_of(number: int) -> str:
    """The text of a document with marks: images in turn with texts, the first at the front of odd ones."""
    opening = "" if number % 2 else "a dog "
    return opening + "".join(f"<image> number {number} place {place} " for place in range(num_images(number)))


def document(number: int, **fields: Any) -> Stored:
    """Document `number`, as it should be unless `fields` of its json say otherwise."""
    names = [f"{place}.png" for place in range(num_images(number))]
    content = {"images": names, "text": text_of(number), **fields}
    images = {name: plain_picture(number, place) for place, name in enumerate(names)}
    return {"__key__": f"doc{number:04d}", "json": json.dumps(content), **images}


def write_documents(folder: Path, counts: list[int], prefix: str = "docs") -> None:
    """Shards with so many documents."""
    start = 0
    for place, count in enumerate(counts):
        write_shard(folder / f"{prefix}-{place:02d}.tar", [document(number) for number in range(start, start + count)])
        start += count
