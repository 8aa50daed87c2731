"""open_clip's own training pipeline, timed in a process of its own, which `benchmarks.data.throughput` starts and asks.

Its environment needs webdataset 0.2: open_clip's training code does not run with 1.0.
"""

import importlib.machinery
import importlib.util
import sys
import types
from itertools import islice
from pathlib import Path
from typing import Any

if importlib.util.find_spec("pandas") is None:  # only its reader of CSV files wants it
    sys.modules["pandas"] = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("pandas", None))

import open_clip
import torch
from open_clip_train.data import get_wds_dataset

from benchmarks.processes import Clock, serve

FAR = 10**7  # samples of an epoch: a measurement ends before


def throughput(folder: str, size: int, batch: int, batches: int, workers: int) -> dict[str, float]:
    """Seconds (`wall`, `cpu`) from the arrival of the first batch to that of the last of `batches` more."""
    arriving = iter(pipeline(folder, size, batch, workers, FAR))
    next(arriving)
    clock = Clock()
    for _ in range(batches):
        images, _texts = next(arriving)
        assert images.shape == (batch, 3, size, size)
        assert images.dtype == torch.float32
    return clock.seconds()


def captions(folder: str, size: int, batch: int, num_samples: int) -> list[str]:
    """The captions that an epoch of open_clip's pipeline delivers, as its tokenizer gives them back."""
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    found = []
    # Asked for more than an epoch has, this pipeline does not end.
    for _images, texts in islice(pipeline(folder, size, batch, 1, num_samples), num_samples // batch):
        for ids in texts.tolist():
            words = [number for number in ids if number not in (0, tokenizer.sot_token_id, tokenizer.eot_token_id)]
            found.append(tokenizer.decode(words).strip())
    return found


def pipeline(folder: str, size: int, batch: int, workers: int, num_samples: int) -> Any:
    """open_clip's training data over the shards in a folder."""
    names = sorted(path.name for path in Path(folder).glob("*.tar"))
    arguments = types.SimpleNamespace(
        train_data=f"{folder}/{{{','.join(names)}}}",
        train_num_samples=num_samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    transform = open_clip.image_transform(size, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"throughput": throughput, "captions": captions})
