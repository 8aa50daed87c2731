"""Batches of token ids: of the captions of shards, or of drawn lengths."""

import json
import tarfile
from collections.abc import Iterator
from glob import glob
from itertools import count, islice

import numpy as np
import open_clip
import torch
from torch import Tensor

_MEAN, _DEVIATION, _LEAST, _MOST = 16.6, 0.8, 3, 75  # of web captions: tokens, and the deviation of their logarithm
_START, _END = 49406, 49407


def batches_of_ids(shards: str | None, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of ids [rows, length] and their lengths [rows], cut to the longest of each."""
    return _drawn(rows, seed) if shards is None else _read(shards, rows)


def _drawn(rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(seed)
    middle = np.log(_MEAN) - _DEVIATION**2 / 2
    while True:
        lengths = torch.from_numpy(rng.lognormal(middle, _DEVIATION, rows).round().clip(_LEAST, _MOST).astype(np.int64))
        ids = torch.from_numpy(rng.integers(1, _START, (rows, int(lengths.max()))))
        ids[:, 0] = _START
        ids[torch.arange(rows), lengths - 1] = _END
        yield ids.masked_fill_(torch.arange(ids.shape[1]) >= lengths[:, None], 0), lengths


def _read(shards: str, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One caption a sample, the next one in every round."""
    tokenize, captions = open_clip.get_tokenizer("ViT-B-32"), _captions(shards)
    while batch := list(islice(captions, rows)):
        ids = tokenize(batch)
        lengths = ids.argmax(1) + 1
        yield ids[:, : int(lengths.max())], lengths


def _captions(shards: str) -> Iterator[str]:
    for number in count():
        for path in sorted(glob(shards)):
            with tarfile.open(path) as members:
                for member in members:
                    if member.name.endswith(".json"):
                        stored = members.extractfile(member)
                        assert stored is not None
                        captions = json.load(stored)["captions"]
                        yield captions[number % len(captions)]
