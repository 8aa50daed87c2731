"""One model's weights under this system's names and under open_clip's."""

import math
from collections.abc import Mapping

from torch import Tensor

from vlm.model.dual_encoder import DualEncoder
from vlm.model.logit_scale import MAX_LOGIT_SCALE
from vlm.model.open_clip_towers import CausalTextTower, PaddedTextTower

_DECODER = {"text_decoder.text_projection": "decoder.vocabulary.weight", "text_decoder.": "decoder."}
_SCALARS = ("logit_scale", "logit_bias")
# Where open_clip's plain CLIP class, without a text module of its own, keeps the text tower.
_PLAIN_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


def has_plain_layout(model: DualEncoder) -> bool:
    """Whether open_clip's plain CLIP class can hold this model, whose text tower is no module of its own there."""
    return isinstance(model.text, CausalTextTower) and model.decoder is None


def to_open_clip(model: DualEncoder) -> dict[str, Tensor]:
    """The model's weights, on the CPU, under open_clip's names.

    The logit scale is stored at most at its limit, which open_clip does not apply itself; scale and bias become 0-dim.
    """
    text = "" if has_plain_layout(model) else "text."
    prefixes = {"image.trunk.": "visual.", _text_prefix(model): text}
    prefixes |= {ours: theirs for theirs, ours in _DECODER.items()}
    weights = {_renamed(name, prefixes): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    weights["logit_scale"] = weights["logit_scale"].clamp(max=math.log(MAX_LOGIT_SCALE))
    for name in _SCALARS:
        if name in weights:
            weights[name] = weights[name].reshape(())
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def from_open_clip(weights: Mapping[str, Tensor], model: DualEncoder) -> dict[str, Tensor]:
    """open_clip's weights, of either layout, under the names of `model`."""
    prefixes = {"visual.": "image.trunk.", "text.": _text_prefix(model), **_DECODER}
    if not any(name.startswith("text.") for name in weights):
        prefixes |= {name: _text_prefix(model) + name for name in _PLAIN_TEXT}
    renamed = {_renamed(name, prefixes): tensor for name, tensor in weights.items()}
    return {name: tensor.reshape(1) if name in _SCALARS else tensor for name, tensor in renamed.items()}


def _text_prefix(model: DualEncoder) -> str:
    return "text.tower." if isinstance(model.text, PaddedTextTower) else "text."


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(old, "") + name[len(old) :]
