"""open_clip's own training pipeline, timed in a process of its own; `benchmarks/data.py` starts it and asks.

Its environment needs webdataset 0.2: open_clip's training code does not run with 1.0.
"""

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

if importlib.util.find_spec("pandas") is None:  # only its reader of CSV files wants it
    sys.modules["pandas"] = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("pandas", None))

import open_clip
import torch
from open_clip_train.data import get_wds_dataset

from benchmarks.processes import Clock, serve

FAR = 10**7  # samples of an epoch: a measurement ends before


def throughput(folder: str, size: int, batch: int, batches: int, workers: int) -> dict[str, float]:
    """Seconds (`wall`, `cpu`) from the arrival of the first batch to that of the last of `batches` more."""
    names = sorted(path.name for path in Path(folder).glob("*.tar"))
    arguments = types.SimpleNamespace(
        train_data=f"{folder}/{{{names[0][:-4]}..{names[-1][:-4]}}}.tar",
        train_num_samples=FAR,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    transform = open_clip.image_transform(size, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
    arriving = iter(data.dataloader)
    next(arriving)
    clock = Clock()
    for _ in range(batches):
        images, _texts = next(arriving)
        assert images.shape == (batch, 3, size, size)
        assert images.dtype == torch.float32
    return clock.seconds()


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"throughput": throughput})
