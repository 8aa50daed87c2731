"""Several trained models as one, whose similarity is the mean of theirs."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.checkpoint.format import first_differences
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig, Towers
from vlm.model.dual_encoder import DualEncoder
from vlm.model.foreign import ForeignFiles
from vlm.model.joined import JoinedTextTower
from vlm.model.joined_kinds import ImageMemberConfig, JoinedImageConfig, JoinedTextConfig, TextMemberConfig
from vlm.model.logit_scale import MAX_LOGIT_SCALE

_PROBES = ("", "a photo of two dogs, one of them red", "Ünïcode & 3,000 émojis 🐶", "one after another " * 60)
_BATCHES_COUNTED = ".num_batches_tracked"


@torch.no_grad()
def join(models: Mapping[str, DualEncoder]) -> DualEncoder:
    """The models, by the names that messages have for them, side by side; of one that is joined already its members.

    Scale and bias are the means of theirs (the scale's of its logarithm). Captioning decoders, and what terms learned,
    are left out.

    Raises:
        UserError: models of different images or tokenizers, some with a logit bias and some without, one whose
            captioning decoder makes its embedding, or a joined one with a head behind it.
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
    members = {name: _members(name, model) for name, model in models.items()}
    files = _files({name: model.files for name, model in models.items()})
    config = _config([(model, members[name]) for name, model in models.items()])
    joined = build_model(config, load_pretrained=False, files=ForeignFiles(files))
    weights = _weights([(model, members[name]) for name, model in models.items()])
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


class _Members(NamedTuple):
    """The towers of a model, each with its head: one of either kind, or those that it is joined of."""

    image: tuple[ImageMemberConfig, ...]
    text: tuple[TextMemberConfig, ...]


def _members(name: str, model: DualEncoder) -> _Members:
    config, towers = model.config, model.config.towers
    assert towers is not None  # the configuration of a built model is resolved
    if isinstance(towers.image, JoinedImageConfig) and isinstance(towers.text, JoinedTextConfig):
        heads = [key for key in ("image_head", "text_head") if getattr(config, key) is not None]
        if heads or len(towers.image.members) != len(towers.text.members):
            what = heads[0] if heads else "not as many image as text towers"
            raise UserError(f"{name}: it is joined, and has {what}: its members cannot stand beside others")
        return _Members(towers.image.members, towers.text.members)
    shared: dict[str, Any] = {"embed_dim": towers.embed_dim, "quick_gelu": bool(config.quick_gelu)}
    return _Members(
        (ImageMemberConfig(tower=towers.image, head=config.image_head, **shared),),
        (TextMemberConfig(tower=towers.text, head=config.text_head, **shared),),
    )


Parts = Sequence[tuple[DualEncoder, _Members]]


def _config(parts: Parts) -> ModelConfig:
    spec = parts[0][0].image_spec
    towers = Towers(
        embed_dim=sum(model.embed_dim for model, _ in parts),
        image=JoinedImageConfig(members=tuple(one for _, members in parts for one in members.image)),
        text=JoinedTextConfig(members=tuple(one for _, members in parts for one in members.text)),
    )
    bias = _mean([(model.logit_bias, members) for model, members in parts])
    scale = _mean([(model.logit_scale, members) for model, members in parts])
    assert scale is not None
    return ModelConfig(
        towers=towers,
        captioner="none",
        freeze_batch_norm=True,
        quick_gelu=False,
        image_size=spec.size,
        image_mean=spec.mean,
        image_std=spec.std,
        interpolation=spec.interpolation,
        resize_mode=spec.resize_mode,
        init_logit_scale=min(MAX_LOGIT_SCALE, math.exp(float(scale))),
        init_logit_bias=None if bias is None else float(bias),
    )


def _weights(parts: Parts) -> dict[str, Tensor]:
    """All weights under their names in the joined model."""
    means = {
        "logit_scale": _mean([(model.logit_scale, members) for model, members in parts]),
        "logit_bias": _mean([(model.logit_bias, members) for model, members in parts]),
    }
    weights = {name: mean for name, mean in means.items() if mean is not None}
    before = 0
    for model, members in parts:
        is_joined = isinstance(model.text, JoinedTextTower)
        for name, tensor in model.state_dict().items():
            place = _place_in_joined(name, before) if is_joined else _place(name, before)
            if place is not None:
                weights[place] = tensor
        before += len(members.image)
    return weights


def _place(name: str, number: int) -> str | None:
    """The name of a model's weight where it is one member; None for one that has no place there."""
    places = {
        "image.trunk.": f"image.trunk.members.{number}.network.",
        "image_head.": f"image.trunk.members.{number}.head.",
        "text.": f"text.members.{number}.network.",
        "text_head.": f"text.members.{number}.head.",
    }
    start = next((start for start in places if name.startswith(start)), None)
    return None if start is None else places[start] + name.removeprefix(start)


def _place_in_joined(name: str, before: int) -> str | None:
    """The name of a joined model's weight behind so many other members."""
    match = re.fullmatch(r"((?:image\.trunk|text)\.members\.)(\d+)(\..+)", name)
    return None if match is None else f"{match[1]}{int(match[2]) + before}{match[3]}"


def _mean(values: Sequence[tuple[Tensor | None, _Members]]) -> Tensor | None:
    """The mean over all members; None where there is nothing."""
    of_members = [value.detach().float() for value, one in values if value is not None for _ in one.image]
    return torch.stack(of_members).mean(0) if of_members else None
