"""A folder of the embeddings of shards: the same bytes from any number of ranks, and through any kill."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

from data.convert.journal import JournalKind
from data.convert.on_ranks import LeftOut, MadeOfShard, ShardWork, share_out, write_ledger
from data.embeddings.embedded import EMBEDDINGS, FORMAT, EmbeddedSamples, EmbeddingsManifest, StoredType, Texts, What
from data.embeddings.parts import manifest_text, part_record, write_part
from data.samples.captions import TxtLayout
from data.shards.source import Source
from vlm.atomic import write_text
from vlm.distributed.world import World
from vlm.errors import UserError, reason

JOURNAL: Final = "embed-journal.jsonl"
LEDGER: Final = "embed-ledger.jsonl"


@dataclass(frozen=True)
class EmbeddedShard(MadeOfShard):
    """The outcome of one shard: samples and texts that were embedded, and the SHA-256 of the part."""

    num_samples: int
    num_texts: int
    sha256: str


EMBEDDING: Final = JournalKind(JOURNAL, EmbeddedShard, "embedding", "writing embeddings")

Embedder = Callable[[Source, int], tuple[EmbeddedSamples, tuple[LeftOut, ...]]]
"""The embeddings of the samples of a source's shard, by its number, and which have none."""


@dataclass(frozen=True)
class EmbeddingFolder:
    """The parts in `out` of a source's shards, `names` telling for each its part's path below it; and what they hold.

    `model` is the identity of the weights.
    """

    source: Source
    names: Mapping[str, str]
    out: Path
    model: str
    dims: Mapping[What, int]
    texts: Texts
    txt: TxtLayout
    stored: StoredType
    precision: str

    @cached_property
    def work(self) -> ShardWork[EmbeddedShard]:
        """The work on all shards."""
        options: dict[str, Any] = {"model": self.model, "what": ",".join(self.dims), "texts": self.texts}
        options |= {"txt": self.txt, "stored": self.stored, "precision": self.precision}
        return ShardWork(self.names, self.out, EMBEDDING, options)

    def manifest(self, results: Mapping[int, EmbeddedShard]) -> EmbeddingsManifest:
        """The manifest of all parts."""
        return EmbeddingsManifest(
            format=FORMAT,
            parts=tuple(
                part_record(holds, file, results[number].sha256)
                for number, (holds, file) in enumerate(zip(self.source.contents, self.names.values(), strict=True))
            ),
            model=self.model,
            dims=dict(self.dims),
            texts=self.texts,
            txt=self.txt,
            stored=self.stored,
            precision=self.precision,
        )

    def finish(self, results: Mapping[int, EmbeddedShard]) -> None:
        """Write ledger and manifest, when all parts are there."""
        write_ledger(self.out / LEDGER, self.work.shards, results)
        write_text(self.out / EMBEDDINGS.file, manifest_text(self.manifest(results)))


def write_embeddings(
    folder: EmbeddingFolder,
    embed: Embedder,
    world: World,
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[int, EmbeddedShard]:
    """Write the parts that are missing as `share_out` does, then the manifest. Collective. Raises UserError."""
    return share_out(folder.work, partial(make_part, folder, embed), folder.finish, world, report)


def make_part(folder: EmbeddingFolder, embed: Embedder, number: int, state: str) -> EmbeddedShard:
    """Write the part of a shard in this state. Raises UserError where that is impossible."""
    path = folder.work.path(number)
    samples, left_out = embed(folder.source, number)
    try:
        stored = write_part(path, samples.columns(folder.stored, folder.texts))
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or reason(error)}") from error
    return EmbeddedShard(
        number=number,
        state=state,
        num_bytes=len(stored),
        left_out=left_out,
        num_samples=len(samples.rows),
        num_texts=0 if samples.text is None else len(samples.text),
        sha256=hashlib.sha256(stored).hexdigest(),
    )
