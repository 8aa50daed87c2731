"""The captions of shards with their embeddings, each distinct text once."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.embeddings.embedded import EmbeddingsManifest, read_texts, require_kind
from data.embeddings.parts import PartsFolder
from data.mining.surface import plain
from data.samples.bad_sample import BadSampleError
from data.samples.captions import CaptionConfig, captions_by_field
from data.shards.reader import ShardReader
from data.shards.source import Source
from vlm.errors import UserError


@dataclass(frozen=True, eq=False)
class Corpus:
    """Distinct texts, `vectors` [texts, dim] the embedding of the first caption that says each.

    `captions[shard][row]` are the numbers of the texts of a sample's captions; `plain_texts` what is compared.
    """

    texts: list[str]
    plain_texts: list[str]
    vectors: NDArray[np.float32]
    captions: list[dict[int, tuple[int, ...]]]

    @property
    def most_captions(self) -> int:
        """The most captions of a sample."""
        return max((len(numbers) for shard in self.captions for numbers in shard.values()), default=0)


def read_corpus(
    source: Source,
    reader: ShardReader,
    embeddings: PartsFolder[EmbeddingsManifest],
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> Corpus:
    """The captions of all samples that were embedded. Raises UserError where embeddings and shards do not fit."""
    require_kind(embeddings, "text", "--embeddings")
    records = embeddings.of_shards(source.contents, "--embeddings")
    numbers: dict[str, int] = {}
    texts: list[str] = []
    firsts: list[NDArray[np.float32]] = []
    captions: list[dict[int, tuple[int, ...]]] = []
    for shard, record in enumerate(records):
        report(shard, len(records))
        rows, num_texts, vectors = read_texts(embeddings, record)
        new: list[int] = []
        of_rows: dict[int, tuple[int, ...]] = {}
        start = 0
        for row, count in zip(rows.tolist(), num_texts.tolist(), strict=True):
            found = _captions(source, reader, shard, row, embeddings.manifest)
            if len(found) != count:
                raise UserError(
                    f"--embeddings: {embeddings.folder} has {count} captions of {_name(source, shard, row)}"
                )
            for place, text in enumerate(found, start=start):
                if (short := plain(text)) not in numbers:
                    numbers[short] = len(numbers)
                    texts.append(text)
                    new.append(place)
            of_rows[row] = tuple(numbers[plain(text)] for text in found)
            start += count
        firsts.append(vectors[new])
        captions.append(of_rows)
    report(len(records), len(records))
    nothing = np.zeros((0, embeddings.manifest.dims["text"]), np.float32)
    return Corpus(texts, list(numbers), np.concatenate([nothing, *firsts]), captions)


def _captions(
    source: Source, reader: ShardReader, shard: int, row: int, manifest: EmbeddingsManifest
) -> tuple[str, ...]:
    """The captions that were embedded, in their order."""
    try:
        sample = source.read(shard, row, reader, ("txt", "json"))
        by_field = captions_by_field(sample.parts.get("txt"), sample.fields, CaptionConfig(txt=manifest.txt))
    except (BadSampleError, OSError) as error:
        raise UserError(f"SHARDS: {_name(source, shard, row)}: {error}") from error
    texts = tuple(text for captions in by_field.values() for text in captions)
    return texts if manifest.texts == "all" else texts[:1]


def _name(source: Source, shard: int, row: int) -> str:
    return f"{source.shards[shard]} #{row}"
