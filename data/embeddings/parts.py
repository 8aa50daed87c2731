"""A folder with a Parquet file, a part, for each of some shards, under a manifest by which data knows it again.

A part is of what its shard holds, not of where it lies: a shard finds its part by the content in its index. The
manifest is sealed, and has the SHA-256 of each part, which is compared whenever the part is read.
"""

import hashlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from data.shards.source import ShardContent
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

    @property
    def holds(self) -> ShardContent:
        """The content of the shard."""
        return ShardContent(self.shard, self.samples, self.content, self.texts_alone, self.content_of_texts_alone)


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
            table = pq.read_table(io.BytesIO(stored), columns=list(columns), use_threads=False)
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise UserError(f"{self.where}: {path} is no Parquet file ({reason(error)})") from None
        if set(table.column_names) != set(columns):
            raise no_part(self, record)
        return table

    def of_shards(self, contents: Sequence[ShardContent], where: str) -> list[PartRecord]:
        """The part of each of some shards, found by content. Raises UserError, which begins with `where`.

        Of shards that hold the very same the first gets the first part, and so on. Where one side does not know of
        samples of texts alone, those with an image decide.
        """
        by_content = defaultdict[tuple[int, str], list[PartRecord]](list)
        for record in self.manifest.parts:
            by_content[record.samples, record.content].append(record)
        found = []
        for one in contents:
            if not one.content:
                raise UserError(f"{where}: the index of {one.name} does not tell its content; `vlm data index --fresh`")
            records = by_content[one.samples, one.content]
            exact = [record for record in records if record.holds[1:] == one[1:]]
            rough = exact or [record for record in records if not (record.texts_alone and one.texts_alone)]
            if not rough:
                raise UserError(self._unknown(one.name, where))
            records.remove(rough[0])
            found.append(rough[0])
        return found

    def _unknown(self, name: str, where: str) -> str:
        known = [record.shard for record in self.manifest.parts]
        if name in known:
            return f"{where}: {self.folder} was made of other samples or texts than {name} holds now"
        return f"{where}: {self.folder} knows nothing of what {name} holds; {nearest(name, known)}"


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


def write_part(path: Path, columns: Mapping[str, pa.Array]) -> bytes:
    """Write a part, whole or not at all: the same columns as the same bytes, which are returned. Raises OSError."""
    table = pa.table(dict(columns))
    with file_aside(path) as aside:
        pq.write_table(table, aside, compression="none", use_dictionary=False, write_statistics=False)
        return aside.read_bytes()


def no_part(folder: PartsFolder[Any], record: PartRecord) -> UserError:
    """The error of a part that is not what its folder's manifest says."""
    return UserError(f"{folder.where}: {folder.folder / record.file} is not what its folder's manifest says")


def rows_of(folder: PartsFolder[Any], record: PartRecord, table: pa.Table) -> NDArray[np.int32]:
    """The column `row` of a part: rows of the shard's index, rising. Raises UserError for anything else."""
    column = table["row"]
    if not pa.types.is_int32(column.type) or column.null_count:
        raise no_part(folder, record)
    rows: NDArray[np.int32] = column.to_numpy()
    if len(rows) and (rows[0] < 0 or rows[-1] >= record.num_rows or int(np.diff(rows).min(initial=1)) < 1):
        raise no_part(folder, record)
    return rows


def part_record(holds: ShardContent, file: str, sha256: str) -> PartRecord:
    """The record of the part of a shard with this content."""
    name, samples, content, texts_alone, content_of_texts_alone = holds
    return PartRecord(
        shard=name,
        samples=samples,
        content=content,
        texts_alone=texts_alone,
        content_of_texts_alone=content_of_texts_alone,
        file=file,
        sha256=sha256,
    )


def parts_identity(records: Sequence[PartRecord]) -> str:
    """A hash of what some parts hold, whatever shards and files are called."""
    digest = blake2b(digest_size=16)
    for record in records:
        digest.update(f"{record.holds[1:]} {record.sha256}\n".encode())
    return digest.hexdigest()
