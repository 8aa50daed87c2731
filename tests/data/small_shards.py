"""Small shards for the tests of `data`, written by webdataset's own writer."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from vlm.model.tokenizer import TokenBatch

SAMPLE = dict[str, bytes | str | int]


def picture(number: int, size: tuple[int, int] = (40, 32), form: str = "JPEG") -> bytes:
    """A smooth random image, (width, height) = `size`, that differs for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stored = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(stored, form)
    return stored.getvalue()


def sample(number: int, **parts: bytes | str | int) -> dict[str, bytes | str | int]:
    """Sample `number` with a picture and a caption, unless `parts` say otherwise."""
    return {"__key__": f"{number:06d}", **(parts or {"jpg": picture(number), "txt": f"caption number {number}"})}


def write_shard(path: Path, samples: Sequence[dict[str, bytes | str | int]]) -> Path:
    """A tar (gzipped if its name says so) with these samples; str, int and bytes parts are written as they stand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [
        {
            key: str(part).encode() if key != "__key__" and not isinstance(part, bytes) else part
            for key, part in one.items()
        }
        for one in samples
    ]
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for one in raw:
            writer.write(one)
    return path


def write_source(folder: Path, counts: Sequence[int], prefix: str = "part", start: int = 0) -> str:
    """Shards with `counts` good samples, numbered on from `start`; returns their pattern."""
    for place, count in enumerate(counts):
        write_shard(folder / f"{prefix}-{place:02d}.tar", [sample(n) for n in range(start, start + count)])
        start += count
    return str(folder / f"{prefix}-*.tar")


def with_json(number: int, **fields: object) -> dict[str, bytes | str | int]:
    """Sample `number` whose captions and other fields are in its json."""
    return sample(number, jpg=picture(number), json=json.dumps(fields))


class WordTokenizer:
    """One id a character: enough to see which captions arrived."""

    context_length = 77

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        lengths = torch.tensor([len(text) for text in texts])
        tokens = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor([ord(letter) for letter in text])
        return TokenBatch(tokens, lengths)


def texts(tokens: torch.Tensor, lengths: torch.Tensor) -> list[str]:
    """The captions that `WordTokenizer` turned into these rows."""
    return ["".join(map(chr, row[:length].tolist())) for row, length in zip(tokens, lengths, strict=True)]
