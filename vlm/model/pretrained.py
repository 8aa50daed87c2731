"""Weights from open_clip's tags and from local files, read without running anything that they contain."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from open_clip.convert import convert_state_dict
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from open_clip.pretrained import download_pretrained, list_pretrained_tags_by_model
from torch import Tensor, nn

from vlm.checkpoint.folder import MANIFEST, checkpoint_at
from vlm.checkpoint.format import Checkpoint, first_differences
from vlm.errors import UserError, nearest, reason
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.open_clip_fields import open_clip_name
from vlm.model.open_clip_folder import WEIGHTS_FILES
from vlm.model.open_clip_names import from_open_clip
from vlm.model.open_clip_towers import PaddedTextTower
from vlm.model.resolve import pretrained_tag
from vlm.model.weights_file import read_weights

# Buffers that older releases saved, and a captioning decoder, which a model without one has no use for.
_WITHOUT_USE = ("text.transformer.embeddings.position_ids", "attn_mask", "text.attn_mask")
_DECODER = "text_decoder."
_MAY_BE_FRESH = ("image_head.", "text_head.", "image_pooler.", "embedding_tokens.", "embedding_tokens.gap.", "decoder.")


def load_pretrained_weights(model: DualEncoder, config: ModelConfig) -> None:
    """Load what `config.pretrained` names into `model`: open_clip's tag, a weights file, a folder with one, a run.

    Position embeddings are resized to the model's image size and context length; a projection head of which the weights
    hold nothing keeps its fresh ones. Raises UserError when nothing is found, when a file cannot be read safely, and,
    naming the first tensors that differ, for another architecture.
    """
    path = _find(config)
    is_checkpoint = (path / MANIFEST).is_file()
    weights = (
        Checkpoint(path).inference_weights()
        if is_checkpoint
        else _translated(read_weights(path, f"pretrained {path}"), model)
    )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.logit_bias is not None:
        weights.setdefault("logit_bias", model.logit_bias.detach())
    for head in _MAY_BE_FRESH:
        if not any(name.startswith(head) for name in weights):
            fresh = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(head)}
            weights.update(fresh)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if differences := first_differences(expected, shapes):
        raise UserError(f"pretrained {config.pretrained}: weights of another architecture: {differences}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not weights[name].is_floating_point():
            raise UserError(f"pretrained {config.pretrained}: {name} holds {weights[name].dtype}")
    model.load_state_dict(weights)


def _find(config: ModelConfig) -> Path:
    assert config.pretrained is not None
    if tag := pretrained_tag(config):
        try:
            return Path(download_pretrained(dict(tag)))
        except (OSError, RuntimeError) as error:
            raise UserError(f"pretrained {config.pretrained}: the download failed: {reason(error)}") from error
    path = Path(config.pretrained)
    if os.path.isfile(path):  # False of a name that is too long for any path
        return path
    if (checkpoint := checkpoint_at(path)) is not None:
        return checkpoint
    for name in WEIGHTS_FILES:
        if os.path.isfile(path / name):
            return path / name
    if config.open_clip is None or path.suffix or "/" in config.pretrained:
        raise UserError(f"pretrained {config.pretrained}: no such file, and no folder with weights")
    tags = list_pretrained_tags_by_model(open_clip_name(config.open_clip))
    choices = nearest(config.pretrained, tags)
    raise UserError(f"pretrained {config.pretrained}: neither a file nor a tag of {config.open_clip}; {choices}")


def _translated(weights: dict[str, Tensor], model: DualEncoder) -> dict[str, Tensor]:
    text = model.text.tower if isinstance(model.text, PaddedTextTower) else model.text
    view = SimpleNamespace(visual=model.image.trunk, text=text)
    weights = convert_state_dict(view, weights)
    weights = {name: value for name, value in weights.items() if name not in _WITHOUT_USE}
    if model.decoder is None:
        weights = {name: value for name, value in weights.items() if not name.startswith(_DECODER)}
    if _same_width(weights, ("visual.positional_embedding",), view.visual):
        resize_pos_embed(weights, view)
    if _same_width(weights, ("positional_embedding", "text.positional_embedding"), text):
        resize_text_pos_embed(weights, view)
    translated = from_open_clip(weights, model)
    known = model.state_dict()
    # Frozen batch norms count no batches.
    return {
        name: value for name, value in translated.items() if name in known or not name.endswith(".num_batches_tracked")
    }


def _same_width(weights: Mapping[str, Tensor], names: tuple[str, ...], tower: nn.Module) -> bool:
    """Whether weights and tower both have position embeddings, of one width."""
    loaded = next((weights[name] for name in names if name in weights), None)
    expected = getattr(tower, "positional_embedding", None)
    return loaded is not None and expected is not None and loaded.shape[1:] == expected.shape[1:]
