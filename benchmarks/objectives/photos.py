"""Flickr8k for many short runs: photographs decoded once to small squares, captions tokenised once, in one file."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vlm.batch import Batch, Images, Texts
from vlm.model.tokenizer import Tokenizer
from vlm.tensor_file import save_tensors

SIZE = 64
STORED = 72  # px: a view of SIZE is cut out of it
CAPTIONS = 5
SPLITS = ("train", "val", "test")
_TENSORS = ("images", "tokens", "lengths")


@dataclass(frozen=True)
class Photos:
    """One split in memory: N pictures, uint8 [N, 3, 72, 72], and their captions' token ids, [N, captions, longest].

    The first `mirrored` of them (None: all) may be seen as mirror images: captions of photographs say no left or right.
    """

    images: Tensor
    tokens: Tensor
    lengths: Tensor
    mirrored: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def centres(self) -> Tensor:
        """The views that are evaluated, uint8 [N, 3, 64, 64]."""
        edge = (STORED - SIZE) // 2
        return self.images[:, :, edge : edge + SIZE, edge : edge + SIZE].contiguous()


def load_photos(data: Path, work: Path, tokenizer: Tokenizer) -> dict[str, Photos]:
    """The three official splits from the shards below `data`, or from what an earlier call left in `work`.

    Token ids count those that occur, in their order: a table of all byte pairs would be nine tenths of the weights.
    """
    return numbered(cached_photos(data, work, tokenizer))


def cached_photos(data: Path, work: Path, tokenizer: Tokenizer) -> dict[str, Photos]:
    """The same with the tokenizer's own ids."""
    return cached_in(work / "photos.safetensors", lambda: {split: _decode(data, split, tokenizer) for split in SPLITS})


def cached_in(file: Path, make: Callable[[], Mapping[str, Photos]]) -> dict[str, Photos]:
    """The splits in a file, made first where there is none."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        parts = {f"{split}/{name}": getattr(made, name) for split, made in make().items() for name in _TENSORS}
        save_tensors(aside, parts)
        aside.replace(file)
    held = load_file(file)
    splits = sorted({key.partition("/")[0] for key in held})
    return {split: _photos(held, split) for split in splits}


def _photos(held: Mapping[str, Tensor], split: str) -> Photos:
    images, tokens, lengths = (held[f"{split}/{name}"] for name in _TENSORS)
    return Photos(images, tokens, lengths)


def numbered(splits: Mapping[str, Photos]) -> dict[str, Photos]:
    """Token ids as places among all ids that occur."""
    vocabulary = torch.unique(torch.cat([photos.tokens.flatten() for photos in splits.values()]))
    return {
        split: replace(photos, tokens=torch.searchsorted(vocabulary, photos.tokens)) for split, photos in splits.items()
    }


def training_batches(photos: Photos, size: int, num_steps: int, seed: int) -> Iterator[Batch]:
    """Batches of `size`; the stream of samples, captions and views is a function of the seed, whatever the size.

    Each epoch has its own order, and for each photograph one of its captions, one crop and perhaps a mirror image.
    Epochs follow each other without a gap, so that every batch is full.
    """
    stream = _samples(len(photos), photos.tokens.shape[1], seed)
    for step in range(num_steps):
        drawn = torch.from_numpy(np.stack([next(stream) for _ in range(size)]))
        ids, captions, tops, lefts, mirrored = drawn.T.contiguous()
        lengths = photos.lengths[ids, captions]
        views = [
            photos.images[i, :, top : top + SIZE, left : left + SIZE]
            for i, top, left in zip(ids.tolist(), tops.tolist(), lefts.tolist(), strict=True)
        ]
        images = torch.stack(views)
        if photos.mirrored is not None:
            mirrored = mirrored * (ids < photos.mirrored)
        images = torch.where(mirrored.bool()[:, None, None, None], images.flip(3), images)
        yield Batch(
            step=step,
            sample_ids=ids,
            keys=tuple(map(str, ids.tolist())),
            parts={
                "image": Images(images),
                "text": Texts(photos.tokens[ids, captions, : int(lengths.max())], lengths),
            },
        )


def _samples(count: int, num_captions: int, seed: int) -> Iterator[np.ndarray]:
    """Rows (sample, caption, top, left, mirrored) without end."""
    epoch = 0
    while True:
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(count)
        captions = random.integers(num_captions, size=count)
        corners = random.integers(STORED - SIZE + 1, size=(count, 2))
        mirrored = random.integers(2, size=count)
        yield from np.column_stack([order, captions, corners, mirrored])
        epoch += 1


def _decode(data: Path, split: str, tokenizer: Tokenizer) -> Photos:
    shards = sorted(data.glob(f"flickr8k-{split}-*.tar"))
    if not shards:
        raise SystemExit(f"{data}: no flickr8k-{split}-*.tar; --data names the folder of the shards")
    samples: dict[str, dict[str, Any]] = {}
    for shard in shards:
        with tarfile.open(shard) as members:
            for member in members:
                key, _, kind = member.name.partition(".")
                content = members.extractfile(member)
                assert content is not None
                samples.setdefault(key, {})[kind] = content.read()
    pixels = np.stack([_square(sample["jpg"]) for sample in samples.values()])
    captions = [json.loads(sample["json"])["captions"] for sample in samples.values()]
    ids, lengths = tokenizer([caption for own in captions for caption in own])
    return Photos(channels_first(pixels), ids.unflatten(0, (-1, CAPTIONS)), lengths.unflatten(0, (-1, CAPTIONS)))


def channels_first(pixels: np.ndarray) -> Tensor:
    """[N, height, width, 3] as [N, 3, height, width]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _square(jpeg: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    return np.asarray(picture.resize((STORED, STORED), Image.Resampling.BICUBIC))
