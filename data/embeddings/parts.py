"""A folder with a Parquet file, a part, for each of some shards, under a manifest by which data knows it again.

A part is of what its shard holds, not of where it lies: a shard finds its part by the content in its index. The
manifest is sealed, and has the SHA-256 of each part, which is compared whenever the part is read.
"""

import hashlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from data.shards.source import Source
from vlm.atomic import file_aside
from vlm.config import Config, first_problem
from vlm.errors import UserError, nearest, reason
from vlm.paths import below
from vlm.sealed import is_sealed, read_json_object, sealed_json

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class PartRecord(Config):
    """One part: its shard's name, what that holds, the part's file and its checksum.

    `samples` have an image; `texts_alone`, which come behind them, have none.
    """

    shard: str
    samples: Count
    content: str
    texts_alone: Count = 0
    content_of_texts_alone: str = ""
    file: str
    sha256: str

    @property
    def num_rows(self) -> int:
        """All samples of the shard."""
        return self.samples + self.texts_alone

    def fits(self, source: Source, number: int, *, exactly: bool) -> bool:
        """Whether a shard of a source holds this; samples of texts alone may be unknown here, or not `exactly`."""
        alone = self.texts_alone, self.content_of_texts_alone
        theirs = source.texts_alone[number]
        return alone == theirs or (not exactly and not (alone[0] and theirs[0]))


class PartsManifest(Config):
    """The base of manifests: `format` names what the parts hold."""

    format: str
    parts: tuple[PartRecord, ...]


Kind = TypeVar("Kind", bound=PartsManifest)


@dataclass(frozen=True)
class PartsKind(Generic[Kind]):
    """One kind of folder of parts: its manifest's file and class, its format, and words: what makes it."""

    file: str
    manifest: type[Kind]
    format: str
    made_by: str


@dataclass(frozen=True)
class PartsFolder(Generic[Kind]):
    """An open folder of parts; `where` begins messages."""

    folder: Path
    manifest: Kind
    where: str

    def read(self, record: PartRecord, columns: Sequence[str]) -> pa.Table:
        """Columns of a part. Raises UserError where it is gone, or not as it was written."""
        path = below(self.folder, record.file, self.where)
        try:
            stored = path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.where}: {path} cannot be read ({error.strerror or error})") from None
        if hashlib.sha256(stored).hexdigest() != record.sha256:
            raise UserError(f"{self.where}: {path} is damaged: its checksum is not the one in its folder's manifest")
        try:
            return pq.read_table(io.BytesIO(stored), columns=list(columns), use_threads=False)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise UserError(f"{self.where}: {path} is no part of embeddings ({reason(error)})") from None

    def of_source(self, source: Source, where: str) -> list[PartRecord]:
        """The part of each of a source's shards, found by content. Raises UserError, which begins with `where`.

        Of shards that hold the very same the first gets the first part, and so on.
        """
        by_content = defaultdict[tuple[int, str], list[PartRecord]](list)
        for record in self.manifest.parts:
            by_content[record.samples, record.content].append(record)
        found = []
        for number, name in enumerate(source.shards):
            if not source.contents[number][1]:
                raise UserError(f"{where}: the index of {name} does not tell its content; see `vlm data index --fresh`")
            records = by_content[source.contents[number]]
            exact = [record for record in records if record.fits(source, number, exactly=True)]
            rough = exact or [record for record in records if record.fits(source, number, exactly=False)]
            if not rough:
                raise UserError(self._unknown(source, number, where))
            records.remove(rough[0])
            found.append(rough[0])
        return found

    def _unknown(self, source: Source, number: int, where: str) -> str:
        name, known = source.stable_names[number], [record.shard for record in self.manifest.parts]
        if name in known:
            return f"{where}: {self.folder} was made of other samples or texts than {source.shards[number]} holds"
        return f"{where}: {self.folder} knows nothing of what {source.shards[number]} holds; {nearest(name, known)}"


def open_parts(folder: Path, kind: PartsKind[Kind], where: str) -> PartsFolder[Kind]:
    """The folder of parts of some kind. Raises UserError, which begins with `where`, for anything else."""
    path = folder / kind.file
    if not path.is_file():
        raise UserError(f"{where}: {folder} has no {kind.file}; {kind.made_by} writes it when it is done")
    values = read_json_object(path)
    if values.get("format") != kind.format:
        raise UserError(f"{where}: {path}: its format is {values.get('format')!r:.60}, not {kind.format!r}")
    if not is_sealed(path):
        raise UserError(f"{where}: {path} is damaged: the checksum in its last line is missing")
    try:
        return PartsFolder(folder, kind.manifest.model_validate(values), where)
    except ValidationError as error:
        raise UserError(f"{where}: {path}: {first_problem(error, kind.manifest)}") from None


def manifest_text(manifest: PartsManifest) -> str:
    """The content of a manifest's file."""
    return sealed_json(manifest.model_dump(mode="json"))


def write_part(path: Path, columns: Mapping[str, pa.Array]) -> None:
    """Write a part, whole or not at all: the same columns as the same bytes. Raises OSError."""
    table = pa.table(dict(columns))
    with file_aside(path) as aside:
        pq.write_table(table, aside, compression="none", use_dictionary=False, write_statistics=False)


def part_record(source: Source, number: int, file: str, sha256: str) -> PartRecord:
    """The record of the part of a shard of a source."""
    (samples, content), (texts_alone, alone) = source.contents[number], source.texts_alone[number]
    return PartRecord(
        shard=source.stable_names[number],
        samples=samples,
        content=content,
        texts_alone=texts_alone,
        content_of_texts_alone=alone,
        file=file,
        sha256=sha256,
    )
