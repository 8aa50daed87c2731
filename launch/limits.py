"""Limits of this machine: a recipe that would take more by one of its numbers is refused before it is tried."""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from launch.recipe import Recipe
from vlm.errors import EveryRankError
from vlm.model.config import ModelConfig

_CHANNELS, _FLOAT_BYTES, _MODALITIES = 3, 4, 2
_HELD = 2  # batches of a rank beside those that its workers hold ready
_COPIES = 4  # of each weight: itself, its gradient and two moments
_MOST_REPEATS = 100


def require_towers_fit(model: ModelConfig) -> None:
    """Refuse towers that are larger than this machine's memory, by their widths and layers.

    Raises:
        EveryRankError: it names the tower, what it takes, and what there is.
    """
    for place, fields in _towers(model):
        width, layers = fields.get("width"), fields.get("layers", 1)
        if not isinstance(width, int) or not isinstance(layers, int):
            continue
        weights = 12 * width**2 * layers + fields.get("vocab_size", 0) * width
        sizes = ", ".join(f"{name} {fields[name]:,}" for name in ("width", "layers", "vocab_size") if name in fields)
        _require_memory(f"model.{place}: {sizes}:", weights * _COPIES * _FLOAT_BYTES)


def require_batches_fit(recipe: Recipe, rows_per_rank: int, image_size: int, embed_dim: int) -> None:
    """Refuse batches of pixels, and queues of embeddings, that this machine's memory cannot hold.

    Raises:
        EveryRankError: it names the key, what it takes, and what there is.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    documents = recipe.data.documents
    held = recipe.data.workers * recipe.data.prefetch + _HELD
    image = held * _CHANNELS * image_size**2 if recipe.data.images else 0
    _require_memory(
        f"global_batch: {recipe.global_batch:,} pairs, {held} batches held ready,", rows_per_rank * image * ranks
    )
    if documents is not None:
        images = math.ceil(documents.per_step * rows_per_rank / recipe.global_batch) * documents.max_images
        words = f"{documents.per_step:,} a step of up to {documents.max_images:,} images each"
        _require_memory(f"data.documents: {words}, {held} batches held ready,", images * image * ranks)
    for key, size in _queues(recipe):
        remembered = size * embed_dim * _FLOAT_BYTES * _MODALITIES
        _require_memory(f"{key}: {size:,} pairs of embeddings", remembered * ranks)


def require_enough_samples(global_batch: int, num_samples: int) -> None:
    """Refuse a global batch that holds each sample a hundred times. Raises EveryRankError."""
    if global_batch > _MOST_REPEATS * num_samples:
        raise EveryRankError(
            f"global_batch: {global_batch:,} is more than {_MOST_REPEATS} times the {num_samples:,} samples of the data"
        )


def _require_memory(words: str, size: int) -> None:
    total = psutil.virtual_memory().total
    if size > total:
        raise EveryRankError(
            f"{words} take {size / 2**30:,.0f} GiB on this machine, which has {total / 2**30:,.0f} GiB of memory"
        )


def _towers(model: ModelConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The fields of open_clip's own towers, by their place in a recipe; towers of other libraries have none of them."""
    if model.architecture is not None:
        towers = {
            "architecture.vision_cfg": model.architecture.vision_cfg,
            "architecture.text_cfg": model.architecture.text_cfg,
        }
    elif model.towers is not None:
        towers = {
            "towers.image.vision_cfg": getattr(model.towers.image, "vision_cfg", {}),
            "towers.text.text_cfg": getattr(model.towers.text, "text_cfg", {}),
        }
    else:
        towers = {}
    for place, fields in towers.items():
        if not fields.get("timm_model_name") and not fields.get("hf_model_name"):
            yield place, fields


def _queues(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """The keys that say how many embeddings are remembered, and what they say."""
    for place, named, key in (("providers", recipe.providers, "size"), ("objective", recipe.objective, "queue_size")):
        for name, config in named.items():
            if isinstance(size := getattr(config, key, None), int):
                yield f"{place}.{name}.{key}", size
