"""Cost of each stage of the training stream alone, the library's own limit of it, and the distance of its pixels."""

import io
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from data.images import jpeg
from data.images.augment import AugmentConfig
from data.images.crop import random_crop, resize_crop
from data.images.pillow import Pixels
from data.images.views import Region, read_region, training_view
from data.loading.loader import SentBatch
from data.loading.pixel_ring import PixelRing
from data.loading.workers import WorkerInfo, load_ahead
from data.order.order import Order, SourceCounts
from data.randomness import Draws
from data.samples.captions import CaptionConfig, captions_by_field, choose
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.reader import ShardReader
from data.shards.source import Sample, Source, open_source
from vlm.batch import Batch, Texts
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import Tokenizer

AUGMENT, CAPTION = AugmentConfig(), CaptionConfig()
TRANSFERRED = 12  # batches
TRANSFER = "transfer to the training process"


class Stored(NamedTuple):
    """One sample on its way: its place, its stored bytes, and what each stage hands to the next."""

    place: tuple[int, int]
    sample: Sample
    header: jpeg.JpegHeader
    region: Region
    view: Pixels
    key: tuple[int | str, ...]


Work = Callable[[Stored], Any]


def read_stored(source: Source, reader: ShardReader, count: int, spec: ImageSpec) -> Iterator[Stored]:
    """Samples spread over a source."""
    for number in np.linspace(0, source.num_samples - 1, count, dtype=int).tolist():
        place = source.place(number)
        sample = source.read(*place, reader)
        key = (0, 0, sample.id)
        header = jpeg.read_header(sample.image)
        assert header is not None
        region = read_region(sample.image, spec, AUGMENT, key)
        yield Stored(place, sample, header, region, resize_crop(region.pixels, region.box, region.reduction, spec), key)


def opened(folder: str) -> tuple[Source, ShardReader]:
    """The shards of a folder as one source."""
    cache = ShardCache()
    return open_source("photographs", [f"{folder}/*.tar"], FolderIndex(cache, folder)), ShardReader(cache)


def stages(folder: str, size: int, batch: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds a sample of each stage alone, and of the bare work in it (the library's call, a plain read)."""
    spec = ImageSpec(size=size)
    source, reader = opened(folder)
    samples = list(read_stored(source, reader, min(batch, 64), spec))
    pixels = np.empty((len(samples), 3, size, size), np.uint8)
    bare_resizes = {id(one): bare_resize(one, size) for one in samples}
    work: dict[str, tuple[Work, Work]] = {
        "read": (lambda one: source.read(*one.place, reader), bare_read(source, reader)),
        "header": (lambda one: jpeg.read_header(one.sample.image), bare_header),
        "draw crop": (draw, draw),
        "decode": (lambda one: jpeg.decode(one.sample.image, one.header, one.region.reduction), bare_decode),
        "resize": (
            lambda one: resize_crop(one.region.pixels, one.region.box, one.region.reduction, spec),
            lambda one: bare_resizes[id(one)](),
        ),
        "write": (partial(write, pixels), partial(write, pixels)),
        "caption": (caption, caption),
    }
    found = {}
    for name, (ours, bare) in work.items():
        found[name] = timed([partial(ours, one) for one in samples], [partial(bare, one) for one in samples], repeats)
    found.update(batch_stages(source, samples, batch, size, repeats))
    return found


def batch_stages(source: Source, samples: list[Stored], batch: int, size: int, repeats: int) -> dict[str, list[float]]:
    """The stages that work on whole batches."""
    order = Order(0, [SourceCounts(source.name, source.counts)], batch)
    tokenizer = Tokenizer(SimpleTokenizer(), shorten=True)
    texts = [caption(samples[row % len(samples)]).text for row in range(batch)]
    alone: dict[str, Callable[[], Any]] = {
        "tokenise": partial(tokenizer, texts),
        "order": partial(order.picks, 5, range(batch)),
        "fresh memory of the batch": partial(fresh_memory, batch, size),
    }
    found = {name: [timed([work], [work], repeats)[0] / batch] * 2 for name, work in alone.items()}
    moved = min(transfer(batch, size) for _ in range(3)) / batch * 1e6
    found[TRANSFER] = [moved, moved]
    return found


def timed(ours: Sequence[Callable[[], Any]], bare: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """The mean over all samples of the fastest of `repeats` runs, of both ways, which take turns; microseconds."""
    best = np.full((2, len(ours)), np.inf)
    for _ in range(repeats):
        for number, pair in enumerate(zip(ours, bare, strict=True)):
            for way, work in enumerate(pair):
                began = time.perf_counter()
                work()
                best[way, number] = min(best[way, number], time.perf_counter() - began)
    return [float(mean) * 1e6 for mean in best.mean(1)]


def bare_read(source: Source, reader: ShardReader) -> Callable[[Stored], bytes]:
    """One read of the bytes of the image and its caption from an open file."""
    files = [os.open(name, os.O_RDONLY) for name in source.shards]

    places: dict[int, tuple[int, int, int]] = {}

    def bare(one: Stored) -> bytes:
        if id(one) not in places:
            shard, row = one.place
            image = reader.index(source.shards[shard], source.stamp(shard), row).extents(row)["image"]
            places[id(one)] = files[shard], image.size, image.offset
        return os.pread(*places[id(one)])

    return bare


def bare_header(one: Stored) -> Any:
    """The library's reading of a header."""
    return simplejpeg.decode_jpeg_header(one.sample.image)


def bare_decode(one: Stored) -> Any:
    """The library's decoding at the reduction that was chosen."""
    height, width = one.region.pixels.shape[:2]
    if one.region.reduction == 1:
        return simplejpeg.decode_jpeg(one.sample.image)
    return simplejpeg.decode_jpeg(one.sample.image, min_height=height, min_width=width)


def bare_resize(one: Stored, size: int) -> Callable[[], Any]:
    """torch's resize of pixels that lie ready."""
    region = one.region
    left, top, right, bottom = (edge / region.reduction for edge in region.box)
    window = region.pixels[int(top) : -int(-bottom // 1), int(left) : -int(-right // 1)]
    ready = torch.from_numpy(window.copy()).permute(2, 0, 1)[None]
    return partial(
        torch.nn.functional.interpolate, ready, size=(size, size), mode="bicubic", antialias=True, align_corners=False
    )


def draw(one: Stored) -> Any:
    """The random crop."""
    draws = Draws("crop", *one.key)
    return random_crop(one.header.width, one.header.height, AUGMENT.crop_scale, AUGMENT.crop_ratio, draws)


def write(pixels: Pixels, one: Stored) -> None:
    """The view into its row of the batch."""
    np.copyto(pixels[one.place[1] % len(pixels)], one.view)


def caption(one: Stored) -> Any:
    """The choice of a caption."""
    stored = one.sample
    captions = captions_by_field(stored.parts.get("txt"), stored.fields, CAPTION)
    return choose(captions, CAPTION, Draws("caption", *one.key))


def fresh_memory(batch: int, size: int) -> None:
    """The first touch of every page of a new batch, in memory that processes share."""
    mmap.mmap(-1, batch * 3 * size * size)[::4096] = bytes(-(-batch * 3 * size * size // 4096))


def transfer(batch: int, size: int) -> float:
    """Seconds for a batch to go from a worker, which does nothing else, to this process, in a run of many."""
    tokens = torch.zeros(batch, 24, dtype=torch.int64)
    ring = PixelRing.ahead(1, 2, batch, size)

    def load(step: int, worker: WorkerInfo) -> SentBatch:
        keys = tuple(f"{row:06d}" for row in range(batch))
        images, _ = ring.room(worker.number)
        return SentBatch(Batch(step, tokens[:, 0], keys, {"text": Texts(tokens, tokens[:, 0])}), images)

    arriving = load_ahead(load, range(TRANSFERRED + 4), workers=1, prefetch=2, arrive=lambda sent: sent.received(ring))
    for _ in range(4):
        next(arriving)
    began = time.perf_counter()
    for _ in range(TRANSFERRED):
        next(arriving)
    return (time.perf_counter() - began) / TRANSFERRED


def quality(folder: str, size: int, count: int) -> dict[str, list[float]]:
    """Mean and least PSNR (dB) by size of the stored image, against open_clip's crop of the same box, and how many."""
    spec = ImageSpec(size=size)
    source, reader = opened(folder)
    found: dict[str, list[float]] = {}
    for one in read_stored(source, reader, count, spec):
        view = np.empty((3, size, size), np.uint8)
        training_view(one.sample.image, spec, AUGMENT, one.key, view)
        name = f"{one.header.width}x{one.header.height}"
        found.setdefault(name, []).append(decibels(view, reference(one, size)))
    return {name: [statistics.mean(values), min(values), len(values)] for name, values in found.items()}


def reference(one: Stored, size: int) -> Pixels:
    """The view that open_clip's RandomResizedCrop makes of that box."""
    box = one.region.box
    image = Image.open(io.BytesIO(one.sample.image)).convert("RGB")
    cropped = resized_crop(
        image, box.top, box.left, box.height, box.width, [size, size], InterpolationMode.BICUBIC, antialias=True
    )
    return np.asarray(cropped).transpose(2, 0, 1)


def decibels(seen: Pixels, expected: Pixels) -> float:
    """The peak signal to noise ratio of 8-bit pixels."""
    noise = np.mean((seen.astype(float) - expected) ** 2)
    return 99.0 if noise == 0 else float(10 * np.log10(255**2 / noise))
