"""`vlm embed`: embeddings of the samples of shards, written by all ranks that a launcher started."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from data.convert.on_ranks import LeftOut, all_left_out, require_same_shards
from data.embeddings.embedded import EMBEDDINGS, EmbeddedSamples, StoredType, Texts, What
from data.embeddings.folder import JOURNAL, LEDGER, EmbeddedShard, EmbeddingFolder, write_embeddings
from data.filter.names import output_names
from data.images.views import evaluation_view
from data.samples.bad_sample import BadSampleError
from data.samples.captions import CaptionConfig, TxtLayout, captions_by_field
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.reader import ShardReader
from data.shards.source import Sample, Source, open_source
from eval.encoder import Encoder, evaluation_mode
from launch.agreement import require_same_view
from launch.evaluate import PATIENCE, loaded_model, print_left_out
from launch.shown_progress import shown_progress
from vlm.checkpoint.data_record import DataRecord
from vlm.errors import EveryRankError, UserError, nearest, reason
from vlm.model.dual_encoder import DualEncoder
from vlm.model.identity import weights_identity
from vlm.paths import output_folder
from vlm.progress import report_progress
from vlm.terminal import Terminal
from vlm.training.precision import Precision

_ROWS = 64
_NO_NUMBER = "its embedding is no number"


@dataclass(frozen=True)
class EmbedConfig:
    """What is embedded, and how it is stored."""

    what: tuple[What, ...]
    texts: Texts = "first"
    txt: TxtLayout = "whole"
    stored: StoredType = "float32"
    precision: Precision = "fp32"


def embed_config(what: str, texts: str, txt: str, stored: str, precision: str) -> EmbedConfig:
    """The same from words of a command line. Raises EveryRankError for one that is unknown."""
    kinds = get_args(What)
    given = tuple(dict.fromkeys(part.strip() for part in what.split(",")))
    options = {
        "--what": (given, kinds),
        "--texts": ((texts,), get_args(Texts)),
        "--txt": ((txt,), get_args(TxtLayout)),
        "--stored": ((stored,), get_args(StoredType)),
        "--precision": ((precision,), get_args(Precision)),
    }
    for option, (words, known) in options.items():
        for word in words:
            if word not in known:
                raise EveryRankError(f"{option}: unknown {word!r:.60}; {nearest(word, known)}")
    chosen = tuple(kind for kind in kinds if kind in given)
    return EmbedConfig(chosen, texts, txt, stored, precision)  # type: ignore[arg-type]


def embed_shards(
    name: str,
    patterns: Sequence[str],
    config: EmbedConfig,
    out: Path,
    *,
    batch_size: int = 256,
    workers: int = 4,
    trust: bool = False,
) -> dict[int, EmbeddedShard]:
    """Write the embeddings of the samples of shards by the model called `name`, and print a table.

    The same command goes on after a kill. What has no embedding is named on standard error, and all of it in the
    folder's ledger. `batch_size` samples are held and `workers` images decoded at a time; no byte depends on either.
    Raises UserError for what cannot be done.
    """
    out = output_folder(out, "--out", files=(JOURNAL, LEDGER, EMBEDDINGS.file))
    cache = ShardCache()
    with loaded_model(name, PATIENCE, trust=trust) as (model, world):
        source = open_source("SHARDS", patterns, FolderIndex(cache, "SHARDS"), images="image" in config.what)
        require_known(source)
        folder = folder_of(source, out, model, config)
        require_same_shards(tuple(folder.names.values()), world)
        record = DataRecord(samples=source.num_samples, shards=len(source.shards), content=source.content)
        require_same_view(world, {"SHARDS": record})
        with (
            evaluation_mode(model, precision=config.precision) as encoder,
            shown_progress(is_main=world.is_main),
            ThreadPoolExecutor(workers) as pool,
        ):
            embedder = ShardEmbedder(model, encoder, config, ShardReader(cache), pool, batch_size)
            results = write_embeddings(folder, embedder, world, partial(report_progress, "shards"))
        if world.is_main:
            print_embedded(folder, results)
        world.barrier()
    return results


def require_known(source: Source) -> None:
    """Refuse shards of which nothing but a name would tell which embeddings are theirs. Raises UserError."""
    for shard, holds in zip(source.shards, source.contents, strict=True):
        if not holds.content:
            raise UserError(
                f"SHARDS: the index of {shard} does not tell its content; `vlm data index --fresh` reads it"
            )


def folder_of(source: Source, out: Path, model: DualEncoder, config: EmbedConfig) -> EmbeddingFolder:
    """The folder of the embeddings of a source's samples by a model."""
    names = {shard: str(Path(one).with_suffix(".parquet")) for shard, one in output_names(source.shards).items()}
    dims: dict[What, int] = dict.fromkeys(config.what, model.embed_dim)
    return EmbeddingFolder(
        source=source,
        names=names,
        out=out,
        model=weights_identity(model),
        dims=dims,
        texts=config.texts,
        txt=config.txt,
        stored=config.stored,
        precision=config.precision,
    )


class _Read(NamedTuple):
    """A sample as the towers take it: pixels where images are wanted, texts where they are."""

    row: int
    key: str
    pixels: Tensor | None
    texts: tuple[str, ...]


class ShardEmbedder:
    """Embeddings of a shard's samples, the same bit for bit whatever else is embedded with them.

    Kernels choose their order of summation by shape, so images and texts go through the towers in tiles of rows that
    depend on the shard alone.
    """

    def __init__(
        self,
        model: DualEncoder,
        encoder: Encoder,
        config: EmbedConfig,
        reader: ShardReader,
        pool: ThreadPoolExecutor,
        batch_size: int,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._config = config
        self._reader = reader
        self._pool = pool
        self._together = _ROWS * -(-batch_size // _ROWS)
        self._device = model.logit_scale.device

    def __call__(self, source: Source, shard: int) -> tuple[EmbeddedSamples, tuple[LeftOut, ...]]:
        """The embeddings of a shard of a source, and the samples that have none."""
        found: list[_Read] = []
        made: dict[What, list[NDArray[np.float32]]] = {what: [] for what in self._config.what}
        left_out: list[LeftOut] = []
        for tile in self._tiles(source, shard):
            left_out += [one for one in tile if isinstance(one, LeftOut)]
            read = [one for one in tile if isinstance(one, _Read)]
            if read:
                found += self._embed(read, made, left_out)
        return self._together_of(found, made), tuple(left_out)

    def _together_of(self, found: Sequence[_Read], made: dict[What, list[NDArray[np.float32]]]) -> EmbeddedSamples:
        nothing = np.zeros((0, self._model.embed_dim), np.float32)
        matrices = {what: np.concatenate([nothing, *parts]) for what, parts in made.items()}
        return EmbeddedSamples(
            rows=np.asarray([one.row for one in found], np.int32),
            keys=tuple(one.key for one in found),
            image=matrices.get("image"),
            text=matrices.get("text"),
            num_texts=np.asarray([len(one.texts) for one in found], np.int32) if "text" in matrices else None,
        )

    def _embed(
        self, read: Sequence[_Read], made: dict[What, list[NDArray[np.float32]]], left_out: list[LeftOut]
    ) -> list[_Read]:
        """Embed one tile into `made`; returns the samples all of whose embeddings are numbers."""
        parts: dict[What, NDArray[np.float32]] = {}
        owners: dict[What, NDArray[np.int64]] = {}
        if "image" in made:
            parts["image"], owners["image"] = self._images(read), np.arange(len(read))
        if "text" in made:
            texts = [text for one in read for text in one.texts]
            parts["text"] = self._texts(texts)
            owners["text"] = np.repeat(np.arange(len(read)), [len(one.texts) for one in read])
        good = np.ones(len(read), bool)
        for what, matrix in parts.items():
            good[owners[what][~np.isfinite(matrix).all(1)]] = False
        for what, matrix in parts.items():
            made[what].append(matrix[good[owners[what]]])
        left_out += [LeftOut(one.key, _NO_NUMBER) for one, is_good in zip(read, good, strict=True) if not is_good]
        return [one for one, is_good in zip(read, good, strict=True) if is_good]

    def _images(self, read: Sequence[_Read]) -> NDArray[np.float32]:
        rows = [one.row % _ROWS for one in read]
        pixels = [one.pixels for one in read if one.pixels is not None]
        images = pixels[0].new_zeros(_ROWS, *pixels[0].shape)
        images[rows] = torch.stack(pixels)
        return self._encoder.encode_image(images.to(self._device))[rows].float().cpu().numpy()

    def _texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Rows too many of the last forward are the last text again."""
        made = []
        for start in range(0, len(texts), _ROWS):
            some = list(texts[start : start + _ROWS])
            tokens, lengths = self._model.tokenizer(some + some[-1:] * (_ROWS - len(some)))
            rows = self._encoder.encode_text(tokens.to(self._device), lengths.to(self._device))
            made.append(rows[: len(some)].float().cpu().numpy())
        return np.concatenate(made)

    def _tiles(self, source: Source, shard: int) -> Iterator[list[_Read | LeftOut]]:
        """A shard's samples, `_ROWS` at a time; those of the next groups are decoded meanwhile."""
        count, waiting = int(source.counts[shard]), list[Future[_Read | LeftOut]]()
        for row in range(count):
            waiting.append(self._submit(source, shard, row))
            if len(waiting) == self._together + _ROWS:
                yield [one.result() for one in waiting[:_ROWS]]
                del waiting[:_ROWS]
            if row % self._together == 0:
                report_progress("samples of this shard", row, count)
        for start in range(0, len(waiting), _ROWS):
            yield [one.result() for one in waiting[start : start + _ROWS]]

    def _submit(self, source: Source, shard: int, row: int) -> "Future[_Read | LeftOut]":
        """Files are read here, one at a time; threads decode."""
        parts = (*(("image",) if "image" in self._config.what else ()), "txt", "json")
        key = source.key_or_row(shard, row, self._reader)
        try:
            sample = source.read(shard, row, self._reader, parts)
        except BadSampleError as error:
            return self._pool.submit(LeftOut, key, reason(error))
        except OSError as error:
            raise UserError(f"{source.shards[shard]}: cannot be read ({error.strerror or error})") from error
        return self._pool.submit(self._view, sample, row)

    def _view(self, sample: Sample, row: int) -> _Read | LeftOut:
        try:
            texts = self._captions(sample) if "text" in self._config.what else ()
            pixels = None
            if "image" in self._config.what:
                view = evaluation_view(sample.image, self._model.image_spec)
                pixels = torch.from_numpy(view.copy()).permute(2, 0, 1)
        except BadSampleError as error:
            return LeftOut(sample.key, reason(error))
        return _Read(row, sample.key, pixels, texts)

    def _captions(self, sample: Sample) -> tuple[str, ...]:
        by_field = captions_by_field(sample.parts.get("txt"), sample.fields, CaptionConfig(txt=self._config.txt))
        texts = tuple(caption for captions in by_field.values() for caption in captions)
        if not texts:
            raise BadSampleError("it has no caption, or only empty ones")
        return texts if self._config.texts == "all" else texts[:1]


def print_embedded(folder: EmbeddingFolder, results: Mapping[int, EmbeddedShard]) -> None:
    """Print the table of what was embedded; what was not is named on standard error."""
    left_out = all_left_out(results)
    print_left_out(folder.work.shards, left_out, folder.out / LEDGER)
    table = Table("what", title="Embeddings")
    table.add_column("value", justify="right")
    table.add_row("shards", f"{len(results):,}")
    table.add_row("samples", f"{sum(one.num_samples for one in results.values()):,}")
    if "text" in folder.dims:
        table.add_row("texts", f"{sum(one.num_texts for one in results.values()):,}")
    table.add_row("dimensions", f"{next(iter(folder.dims.values())):,}")
    table.add_row("skipped", f"{len(left_out):,}")
    console = Terminal()
    console.print(table)
    console.print(f"embedded: {folder.out}", soft_wrap=True)
