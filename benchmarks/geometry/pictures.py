"""Photographs of Flickr8k and rendered scenes for many short runs: small squares and token ids in memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from benchmarks.objectives.photos import STORED, Photos, cached_in, cached_photos, channels_first, numbered
from data.scenes.render import render
from data.scenes.splits import NUM_RETRIEVAL, ZEROSHOT_PER_CLASS, ZEROSHOT_TEMPLATES, Plan, mixed, retrieval, zeroshot
from data.scenes.vocabulary import class_names
from vlm.model.tokenizer import Tokenizer

SCENES = 6_000  # as many as there are photographs to train on


@dataclass(frozen=True)
class Pictures:
    """The pictures that runs train on and those that they are measured on.

    `train` holds photographs, then scenes; `photos` and `scenes` are for retrieval, `single` for zero-shot with
    `labels`; `prompts` has a row a class and a column a template (its images mean nothing); `watched` are photographs
    looked at on the way.
    """

    train: Photos
    photos: Photos
    scenes: Photos
    single: Photos
    prompts: Photos
    watched: Photos
    labels: Int64[Tensor, " singles"]


def load_pictures(data: Path, work: Path, tokenizer: Tokenizer) -> Pictures:
    """All of it from the shards below `data`, or from what an earlier call left in `work`."""
    photos = cached_photos(data, work, tokenizer)
    scenes = cached_in(work / "scenes.safetensors", lambda: _scenes(tokenizer))
    found = numbered({**photos, **scenes})
    train = _joined([found["train"], found["scenes"]], mirrored=len(found["train"]))
    held_out = found["val"]
    watched = Photos(held_out.images[:500], held_out.tokens[:500], held_out.lengths[:500])
    num_classes = len(class_names())
    labels = torch.arange(len(found["zeroshot"])) % num_classes
    return Pictures(train, found["test"], found["retrieval"], found["zeroshot"], found["prompts"], watched, labels)


def _scenes(tokenizer: Tokenizer) -> dict[str, Photos]:
    num_classes = len(class_names())
    prompts, lengths = tokenizer([template.format(name) for name in class_names() for template in ZEROSHOT_TEMPLATES])
    shape = (num_classes, len(ZEROSHOT_TEMPLATES))
    nothing = torch.zeros(num_classes, 3, STORED, STORED, dtype=torch.uint8)
    return {
        "scenes": _rendered(mixed(0, "train", 0, SCENES), tokenizer),
        "retrieval": _rendered(retrieval(0, "retrieval", 0, NUM_RETRIEVAL), tokenizer),
        "zeroshot": _rendered(zeroshot(0, "zeroshot", 0, ZEROSHOT_PER_CLASS * num_classes), tokenizer),
        "prompts": Photos(nothing, prompts.unflatten(0, shape), lengths.unflatten(0, shape)),
    }


def _rendered(plans: Iterable[Plan], tokenizer: Tokenizer) -> Photos:
    listed = list(plans)
    pixels = np.stack([np.asarray(render(plan.scene, plan.rng, STORED)) for plan in listed])
    captions = [[said.text for said in plan.captions] for plan in listed]
    ids, lengths = tokenizer([text for own in captions for text in own])
    shape = (-1, len(captions[0]))
    return Photos(channels_first(pixels), ids.unflatten(0, shape), lengths.unflatten(0, shape))


def _joined(parts: Sequence[Photos], mirrored: int) -> Photos:
    """One set of several, each with as many captions and as long ones as all have: those of the fewest, the longest."""
    captions = min(part.tokens.shape[1] for part in parts)
    longest = max(part.tokens.shape[2] for part in parts)
    tokens = [torch.nn.functional.pad(part.tokens[:, :captions], (0, longest - part.tokens.shape[2])) for part in parts]
    images, lengths = [part.images for part in parts], [part.lengths[:, :captions] for part in parts]
    return Photos(torch.cat(images), torch.cat(tokens), torch.cat(lengths), mirrored)
