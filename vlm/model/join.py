"""Several trained models as one, whose similarity is the mean of theirs."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlm.checkpoint.format import TERM_PARAMETERS, first_differences
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig, Towers
from vlm.model.dual_encoder import DualEncoder
from vlm.model.foreign import ForeignFiles
from vlm.model.joined_kinds import ImageMemberConfig, JoinedImageConfig, JoinedTextConfig, TextMemberConfig
from vlm.model.logit_scale import MAX_LOGIT_SCALE

_PROBES = ("", "a photo of two dogs, one of them red", "Ünïcode & 3,000 émojis 🐶", "one after another " * 60)
_BATCHES_COUNTED = ".num_batches_tracked"


@torch.no_grad()
def join(models: Mapping[str, DualEncoder]) -> DualEncoder:
    """The models, by the names that messages have for them, side by side.

    Scale and bias are the means of theirs (the scale's of its logarithm). Captioning decoders, and what terms learned,
    are left out.

    Raises:
        UserError: models of different images or tokenizers, some with a logit bias and some without, or one whose
            captioning decoder makes its embedding.
    """
    first, *_ = models
    for (name, one), (another, other) in pairwise(models.items()):
        _require_alike(name, one, another, other)
    for name, model in models.items():
        if model.decoder is not None:
            try:
                model.drop_decoder()
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
    files = _files({name: model.files for name, model in models.items()})
    joined = build_model(_config(list(models.values())), load_pretrained=False, files=ForeignFiles(files))
    weights = _weights(list(models.values()))
    known = joined.state_dict()
    weights = {name: one for name, one in weights.items() if name in known or not name.endswith(_BATCHES_COUNTED)}
    shapes = [{name: tuple(tensor.shape) for name, tensor in one.items()} for one in (known, weights)]
    if differences := first_differences(shapes[0], shapes[1]):
        raise UserError(f"{first} and others cannot be joined: {differences}")
    joined.load_state_dict(weights)
    return joined


def _require_alike(name: str, one: DualEncoder, another: str, other: DualEncoder) -> None:
    specs = [model.image_spec.model_dump() for model in (one, other)]
    for key, value in specs[0].items():
        if specs[1][key] != value:
            raise UserError(f"{another}: its images have {key} {specs[1][key]}, those of {name} {value}")
    ids = [model.tokenizer.inner(_PROBES) for model in (one, other)]
    if ids[0] != ids[1] or one.text.context_length != other.text.context_length:
        raise UserError(f"{another}: its tokenizer is not that of {name}, or makes texts of another length")
    if (one.logit_bias is None) != (other.logit_bias is None):
        has, has_not = (name, another) if one.logit_bias is not None else (another, name)
        raise UserError(f"{has} has a logit bias, {has_not} has none: their logits have no common meaning")


def _files(files_by_model: Mapping[str, Mapping[str, bytes]]) -> dict[str, bytes]:
    merged: dict[str, bytes] = {}
    for name, files in files_by_model.items():
        for file, content in files.items():
            if merged.setdefault(file, content) != content:
                raise UserError(f"{name}: its {file} is not that of the other models: one such file is kept for all")
    return merged


def _config(models: Sequence[DualEncoder]) -> ModelConfig:
    spec = models[0].image_spec
    embed_dim = sum(model.embed_dim for model in models)
    image, text = [], []
    for model in models:
        config, towers = model.config, model.config.towers
        assert towers is not None  # the configuration of a built model is resolved
        shared: dict[str, Any] = {"embed_dim": towers.embed_dim, "quick_gelu": bool(config.quick_gelu)}
        image.append(ImageMemberConfig(tower=towers.image, head=config.image_head, **shared))
        text.append(TextMemberConfig(tower=towers.text, head=config.text_head, **shared))
    joined = Towers(
        embed_dim=embed_dim, image=JoinedImageConfig(members=tuple(image)), text=JoinedTextConfig(members=tuple(text))
    )
    return ModelConfig(
        towers=joined,
        captioner="none",
        freeze_batch_norm=True,
        quick_gelu=False,
        image_size=spec.size,
        image_mean=spec.mean,
        image_std=spec.std,
        interpolation=spec.interpolation,
        resize_mode=spec.resize_mode,
        init_logit_scale=min(MAX_LOGIT_SCALE, math.exp(float(_mean([model.logit_scale for model in models])))),
        init_logit_bias=_bias(models),
    )


def _weights(models: Sequence[DualEncoder]) -> dict[str, Tensor]:
    weights = {"logit_scale": _mean([model.logit_scale for model in models])}
    biases = [model.logit_bias for model in models if model.logit_bias is not None]
    if biases:
        weights["logit_bias"] = _mean(biases)
    places = {"image.trunk.": "image.trunk.members.{}.network.", "image_head.": "image.trunk.members.{}.head."}
    places |= {"text.": "text.members.{}.network.", "text_head.": "text.members.{}.head."}
    for number, model in enumerate(models):
        for name, tensor in model.state_dict().items():
            place = next((place for place in places if name.startswith(place)), None)
            if place is not None and not name.startswith(TERM_PARAMETERS):
                weights[places[place].format(number) + name.removeprefix(place)] = tensor
    return weights


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.detach().float() for value in values]).mean(0)


def _bias(models: Sequence[DualEncoder]) -> float | None:
    biases = [model.logit_bias for model in models if model.logit_bias is not None]
    return float(_mean(biases)) if biases else None
