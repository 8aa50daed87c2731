"""Statistics of a source's texts, counted once, when its shards are indexed."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data.samples.bad_sample import BadSampleError
from data.samples.captions import MOST_CHARACTERS, listed, read_fields, readable
from vlm.config import Config

LONGEST = 256  # lengths from here on share the last place of a histogram
Count = Annotated[int, Field(ge=0, lt=2**40)]


class ShardStatistics(Config):
    """Counts over the samples of one shard, or of many.

    `documents` are samples with images between their texts, which `document_images` counts. `fields` says how many
    samples hold text under a name: "txt", or a field of their json. `tokens[n]` counts the captions of n tokens of
    CLIP's byte pairs, start and end included; the last place counts all longer ones too.
    """

    samples: Count = 0
    labelled: Count = 0
    captions: Count = 0
    documents: Count = 0
    document_images: Count = 0
    fields: dict[str, Count] = Field(default={})
    tokens: tuple[Count, ...] = Field(default=(), max_length=LONGEST + 1)


def sum_statistics(by_shard: Iterable[ShardStatistics]) -> ShardStatistics:
    """The statistics of all samples together."""
    total = dict.fromkeys(("samples", "labelled", "captions", "documents", "document_images"), 0)
    fields: dict[str, int] = {}
    tokens = np.zeros(LONGEST + 1, dtype=np.int64)
    for statistics in by_shard:
        for name in total:
            total[name] += getattr(statistics, name)
        for name, count in statistics.fields.items():
            fields[name] = fields.get(name, 0) + count
        tokens[: len(statistics.tokens)] += np.asarray(statistics.tokens, dtype=np.int64)
    return ShardStatistics(**total, fields=fields, tokens=_trimmed(tokens))


def text_fields(text: bytes | None, stored_json: bytes | None) -> dict[str, tuple[str, ...]]:
    """The non-empty texts of a sample by field: "txt", and every json field that is a text or a list of texts."""
    texts_by_field: dict[str, tuple[str, ...]] = {}
    if text is not None:
        texts_by_field["txt"] = (readable(text[: 4 * MOST_CHARACTERS].decode("utf-8-sig", "replace")),)
    try:
        fields = read_fields(stored_json)
    except BadSampleError:
        fields = {}
    for name, value in fields.items():
        with suppress(BadSampleError):  # it holds no captions
            texts_by_field[name] = tuple(listed(value))
    stripped = {name: tuple(text.strip() for text in texts if text.strip()) for name, texts in texts_by_field.items()}
    return {name: texts for name, texts in stripped.items() if texts}


def usual_captions(fields: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The captions to train on where a recipe names no field: json `captions`, else txt, else json `caption`."""
    return next((fields[name] for name in ("captions", "txt", "caption") if name in fields), ())


def histogram(lengths: Sequence[int] | NDArray[np.int64]) -> tuple[int, ...]:
    """The count of each length from 0 on; the last place counts all from `LONGEST` on."""
    return _trimmed(np.bincount(np.minimum(np.asarray(lengths, dtype=np.int64), LONGEST), minlength=1))


def _trimmed(counts: NDArray[np.int64]) -> tuple[int, ...]:
    used = np.flatnonzero(counts)
    return tuple(counts[: used[-1] + 1].tolist()) if len(used) else ()
