"""The embeddings of a shard's samples: as they are stored in a part, and as they are read back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from data.embeddings.parts import PartRecord, PartsFolder, PartsKind, PartsManifest, no_part, rows_of
from data.samples.captions import TxtLayout
from vlm.errors import UserError

FORMAT: Final = "vlm-embeddings-1"

What = Literal["image", "text"]
StoredType = Literal["float32", "float16"]
Texts = Literal["first", "all"]

_ARROW = {"float32": pa.float32(), "float16": pa.float16()}


class EmbeddingsManifest(PartsManifest):
    """What a folder of embeddings is of: `model` is the identity of the weights, `dims` the width of each kind."""

    model: str
    dims: dict[What, Annotated[int, Field(gt=0, le=2**20)]] = Field(min_length=1)
    texts: Texts
    txt: TxtLayout
    stored: StoredType
    precision: str


EMBEDDINGS: Final = PartsKind("embeddings.json", EmbeddingsManifest, FORMAT, "`vlm embed`")


@dataclass(frozen=True)
class EmbeddedSamples:
    """Unit vectors of some samples of a shard by the rows of its index, in order; None of what was not embedded.

    `num_texts` are the texts that each sample has in `text`, one after another.
    """

    rows: NDArray[np.int32]
    keys: tuple[str, ...]
    image: NDArray[np.float32] | None
    text: NDArray[np.float32] | None
    num_texts: NDArray[np.int32] | None

    def columns(self, stored: StoredType, texts: Texts) -> dict[str, pa.Array]:
        """The columns of a part: key, row, and a list of numbers (of lists, of `all` texts) for each kind."""
        columns = {"key": pa.array(_as_text(self.keys), pa.string()), "row": pa.array(self.rows, pa.int32())}
        if self.image is not None:
            columns["image"] = _vectors(self.image, stored)
        if self.text is not None:
            columns["text"] = _vectors(self.text, stored)
            if texts == "all":
                assert self.num_texts is not None
                ends = np.concatenate([[0], np.cumsum(self.num_texts)]).astype(np.int32)
                columns["text"] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), columns["text"])
        return columns


class Vectors(NamedTuple):
    """Embeddings of one kind of one shard: the rows of samples in its index, and a unit vector of each."""

    rows: NDArray[np.int32]
    vectors: NDArray[np.float32]


class TextVectors(NamedTuple):
    """Embeddings of all texts of one shard's samples: their rows, how many texts each has, a unit vector a text."""

    rows: NDArray[np.int32]
    num_texts: NDArray[np.int32]
    vectors: NDArray[np.float32]


def require_kind(folder: PartsFolder[EmbeddingsManifest], what: What, option: str) -> None:
    """Raise UserError, which begins with `option`, where embeddings of this kind are not in the folder."""
    dims = folder.manifest.dims
    if what not in dims:
        raise UserError(f"{option}: {folder.folder} has embeddings of {' and '.join(dims)} alone, none of {what}")


def read_vectors(folder: PartsFolder[EmbeddingsManifest], record: PartRecord, what: What) -> Vectors:
    """The embeddings of one kind of a shard's samples; of several texts that of the first. Raises UserError."""
    if what == "image":
        table = folder.read(record, ["row", "image"])
        return Vectors(rows_of(folder, record, table), _matrix(folder, record, table["image"], what))
    texts = read_texts(folder, record)
    first = np.cumsum(texts.num_texts) - texts.num_texts
    return Vectors(texts.rows, texts.vectors[first])


def read_texts(folder: PartsFolder[EmbeddingsManifest], record: PartRecord) -> TextVectors:
    """The embeddings of all embedded texts of a shard's samples. Raises UserError."""
    table = folder.read(record, ["row", "text"])
    rows, column = rows_of(folder, record, table), table["text"].combine_chunks()
    if folder.manifest.texts == "first":
        return TextVectors(rows, np.ones(len(rows), np.int32), _matrix(folder, record, column, "text"))
    if not pa.types.is_list(column.type):
        raise no_part(folder, record)
    num_texts = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int32)
    if len(num_texts) and num_texts.min() < 1:
        raise no_part(folder, record)
    return TextVectors(rows, num_texts, _matrix(folder, record, column.flatten(), "text"))


def _as_text(keys: Sequence[str]) -> list[str]:
    """Keys that are no text, with what is none written out: rows tell samples apart."""
    return [key.encode("utf-8", "backslashreplace").decode() for key in keys]


def _vectors(matrix: NDArray[np.float32], stored: StoredType) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(matrix.astype(stored)).reshape(-1), _ARROW[stored])
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def _matrix(
    folder: PartsFolder[EmbeddingsManifest], record: PartRecord, column: pa.Array | pa.ChunkedArray, what: What
) -> NDArray[np.float32]:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width = folder.manifest.dims[what]
    expected = pa.list_(_ARROW[folder.manifest.stored], width)
    if not pa.types.is_fixed_size_list(array.type) or array.type.value_type != expected.value_type:
        raise no_part(folder, record)
    if array.type.list_size != width or array.null_count:
        raise no_part(folder, record)
    matrix: NDArray[np.float32] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width).astype(np.float32)
    return matrix
