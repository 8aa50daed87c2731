"""Indexing shards: on first use, or ahead by `vlm data index`."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.pools.base import Pool, Workers
from data.pools.local import LocalPool, open_pool
from data.shards.cache import ShardCache
from data.shards.sidecar import SUFFIX, ShardIndex, load_index, make_index, parse_index, save_index
from data.shards.stamp import Stamp
from data.shards.statistics import ShardStatistics, histogram, text_fields, usual_captions
from data.shards.store import companion, is_remote, read_bytes
from data.shards.tar import TEXT_SUFFIXES, Listing, NoTarError, Problem, list_shard, read_extent
from vlm.errors import UserError

# Fewer bytes, or remote shards, than this are indexed here: processes of their own take a second to start.
_WORTH_A_POOL = 256 << 20
_REMOTE_WORTH_A_POOL = 8
_COUNTED_FIELDS = 64
_COUNTED_LETTERS = 10_000  # of a caption: longer ones are in the histogram's last place anyway
_CONTENT_DIGITS = 16


def index_file(file: Path, shown: str, stamp: Stamp, where: str) -> ShardIndex:
    """Read the headers and the texts of a plain tar and describe them; `shown` is the shard's name for messages.

    A file that is no tar is described as a shard without samples, and with that problem.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        listing = list_shard(file, shown, where)
    except NoTarError as error:
        listing = Listing({}, (Problem("", f"it {str(error).removeprefix(f'{where}: {shown} ')}"),))
    index = make_index(listing, stamp)
    header, first = index.header, index.num_with_image
    assert header.imageless is not None
    statistics, content = _read_texts(file, index, range(first), header.statistics)
    update: dict[str, object] = {"statistics": statistics, "content": content}
    if header.imageless.samples:
        imageless, imageless_content = _read_texts(file, index, range(first, len(index)), header.imageless)
        update |= {"imageless": imageless, "imageless_content": imageless_content}
    return replace(index, header=header.model_copy(update=update))


def _read_texts(file: Path, index: ShardIndex, rows: range, counted: ShardStatistics) -> tuple[ShardStatistics, str]:
    """Statistics of the texts, and a hash of all that is cheap to read of the content: keys, sizes, texts, labels.

    It depends neither on where the shard lies nor on how its tar was written.
    """
    from vlm.model.byte_pairs import clip_token_counts  # seconds of imports, which opening a shard can do without

    fields: dict[str, int] = {}
    captions: list[str] = []
    content = hashlib.sha256()
    before, end = (int(index.key_ends[row - 1]) if row else 0 for row in (rows.start, rows.stop))
    chosen = slice(rows.start, rows.stop)
    arrays = (index.key_ends[chosen] - before, index.keys[before:end], index.offsets[chosen] > 0, index.sizes[chosen])
    images = None if rows.start else index.images  # no sample of a text alone has any
    of_documents = () if images is None else (images.image_names, images.image_sizes)
    for array in (*arrays, *of_documents):
        content.update(np.ascontiguousarray(array).data)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for row in rows:
            extents = index.extents(row)
            texts = {part: read_extent(descriptor, extents[part]) for part in TEXT_SUFFIXES if part in extents}
            for text in texts.values():
                content.update(text)
            texts_by_field = text_fields(texts.get("txt"), texts.get("json"))
            for name in texts_by_field:
                if name in fields or len(fields) < _COUNTED_FIELDS:
                    fields[name] = fields.get(name, 0) + 1
            captions.extend(caption[:_COUNTED_LETTERS] for caption in usual_captions(texts_by_field))
    except OSError:
        pass  # a cut shard: its last texts are counted by whoever can read them
    finally:
        os.close(descriptor)
    statistics = counted.model_copy(
        update={
            "captions": len(captions),
            "fields": fields,
            "tokens": histogram(clip_token_counts(captions)) if captions else (),
        }
    )
    return statistics, content.hexdigest()[:_CONTENT_DIGITS]


@dataclass(frozen=True)
class Indexer:
    """Finder and maker of the index of shards; picklable, so that processes can share the work.

    A `fresh` one believes no sidecar.
    """

    cache: ShardCache
    where: str
    fresh: bool = False

    def __call__(self, name: str) -> ShardIndex:
        """The index of the shard as it is now: its sidecar when that is fresh, else a new one, which is kept.

        Raises:
            UserError: the shard cannot be read.
        """
        try:
            stamp = self.cache.stamp(name)
            stored = None if self.fresh else self.find(name, stamp)
            if stored is not None:
                return stored
            index = index_file(self.cache.local(name, stamp), name, stamp, self.where)
        except OSError as error:
            raise UserError(f"{self.where}: {name} cannot be read ({error.strerror or error})") from error
        self._keep(name, index)
        return index

    def find(self, name: str, stamp: Stamp) -> ShardIndex | None:
        """The kept index that describes the shard in this state: in the cache folder, or beside it."""
        stored = load_index(self.cache.place(name, SUFFIX))
        if stored is not None and stored.stamp == stamp:
            return stored
        beside = self._beside(name)
        if beside is None or beside.stamp != stamp:
            return None
        if is_remote(name):
            self._keep(name, beside)
        return beside

    def _beside(self, name: str) -> ShardIndex | None:
        sidecar = companion(name, SUFFIX)
        if not is_remote(name):
            return load_index(Path(sidecar))
        try:
            return parse_index(read_bytes(sidecar, self.cache.retry), sidecar)
        except OSError:
            return None

    def _keep(self, name: str, index: ShardIndex) -> None:
        """Beside a local shard where that can be written, else in the cache folder; not keeping it costs time only."""
        in_cache = self.cache.place(name, SUFFIX)
        for path in [in_cache] if is_remote(name) else [Path(name + SUFFIX), in_cache]:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_index(index, path)
            except OSError:
                continue
            return


def index_shards(
    names: Sequence[str], indexer: Indexer, *, workers: Workers = None
) -> Iterator[tuple[str, ShardIndex]]:
    """Each shard with its index, from several processes (default: one a core) where that pays."""
    small = sum(os.path.getsize(name) for name in names if os.path.exists(name)) < _WORTH_A_POOL
    in_process = small and sum(map(is_remote, names)) < _REMOTE_WORTH_A_POOL
    is_here = not isinstance(workers, Pool) or isinstance(workers, LocalPool)
    with open_pool(1 if in_process and is_here else workers) as pool:
        yield from zip(names, pool.in_order(indexer, names), strict=True)
