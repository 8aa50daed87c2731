"""The weights of one tower from a file: of the bare network, or of a model that has it as a part."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from vlm.checkpoint.folder import MANIFEST
from vlm.checkpoint.format import Checkpoint, first_differences
from vlm.errors import UserError
from vlm.model.language_model_tower import LanguageModelTower
from vlm.model.open_clip_folder import WEIGHTS_FILES
from vlm.model.open_clip_towers import PaddedTextTower
from vlm.model.towers import ImageTower, TextTower
from vlm.model.transformers_towers import TransformersImageTrunk, TransformersTextTower
from vlm.model.weights_file import left_out_words, read_weights

_FILES = ("model.safetensors", *WEIGHTS_FILES, "pytorch_model.bin")
# Buffers that some releases save; they hold nothing that was learned.
_WITHOUT_USE = ("num_batches_tracked", "position_ids", "attn_mask")
_SHOWN = 3


@torch.no_grad()
def load_tower_weights(tower: ImageTower | TextTower, path: str, where: str) -> list[str]:
    """Copy the tensors at `path` into the tower; lines on what of them is left out, such as a classifier.

    The file holds the network as its library names it, or a model with the network somewhere in it. A projection to the
    embedding is taken if the file has it in this shape, and stays fresh otherwise.

    Raises:
        UserError: there are no such weights, or they are of another network: named are the first tensors that are
            missing, have another shape, or have no place in the tower.
    """
    weights = _tensors_at(Path(path), f"{where} {path}")
    network, inner = _network_of(tower)
    held: dict[str, Tensor] = network.state_dict(keep_vars=True)
    projection = _identities(tower.projection_parts())
    core = {
        name.removeprefix(inner): tensor
        for name, tensor in held.items()
        if name.startswith(inner) and id(tensor) not in projection
    }
    outer = _place_in(weights, core)
    stored_core = {name.removeprefix(outer): tensor for name, tensor in weights.items() if name.startswith(outer)}
    _require_same_network(core, stored_core, _classifiers_of(network), f"{where} {path}")
    taken = {outer + name: tensor for name, tensor in core.items() if name in stored_core}
    if outer.endswith(inner):
        taken |= _projection_in(weights, held, projection, outer.removesuffix(inner))
    for name, tensor in taken.items():
        if tensor.is_floating_point() and not weights[name].is_floating_point():
            raise UserError(f"{where} {path}: {name} holds {weights[name].dtype}")
        tensor.copy_(weights[name])
    left_out = [name for name in weights if name not in taken and not name.endswith(_WITHOUT_USE)]
    return left_out_words(f"{where} {path}", left_out)


def _tensors_at(path: Path, where: str) -> dict[str, Tensor]:
    if os.path.isfile(path / MANIFEST):
        return Checkpoint(path).inference_weights()
    if os.path.isfile(path):
        return read_weights(path, where)
    for name in _FILES:
        if os.path.isfile(path / name):
            return read_weights(path / name, where)
    raise UserError(f"{where}: no such file, and no folder with weights ({', '.join(_FILES)})")


def _network_of(tower: ImageTower | TextTower) -> tuple[nn.Module, str]:
    """The module that has the tower's weights, and the place in it of what its library calls the model."""
    network: nn.Module = tower
    if isinstance(tower, ImageTower):
        network = tower.trunk
    elif isinstance(tower, PaddedTextTower):
        network = tower.tower
    if isinstance(network, TimmModel):
        return network, "trunk."
    if isinstance(network, HFTextEncoder):
        return network, "transformer."
    if isinstance(network, TransformersImageTrunk | TransformersTextTower | LanguageModelTower):
        return network, "model."
    return network, ""


def _identities(layers: list[nn.Module | nn.Parameter]) -> set[int]:
    tensors = [
        layer.state_dict(keep_vars=True).values() if isinstance(layer, nn.Module) else [layer] for layer in layers
    ]
    return {id(tensor) for group in tensors for tensor in group}


def _place_in(weights: Mapping[str, Tensor], core: Mapping[str, Tensor]) -> str:
    """The prefix of the network's names in a file: that of most of them, in their shapes above all."""
    places: Counter[str] = Counter()
    for name, tensor in weights.items():
        words = name.split(".")
        for start in range(len(words)):
            inner = core.get(".".join(words[start:]))
            if inner is not None:
                places[name.removesuffix(".".join(words[start:]))] += 1 + (inner.shape == tensor.shape)
    return places.most_common(1)[0][0] if places else ""


def _classifiers_of(network: nn.Module) -> tuple[str, ...]:
    """Where a model of timm has its classifier, which may lie within a part that the tower has."""
    named = network.trunk.default_cfg.get("classifier", ()) if isinstance(network, TimmModel) else ()
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named or ()))


def _require_same_network(
    core: Mapping[str, Tensor], stored_core: Mapping[str, Tensor], left_out: tuple[str, ...], where: str
) -> None:
    """Raise for what is missing or has another shape, or has no place within a part that the tower has."""
    modules = {name.partition(".")[0] for name in core}
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in core.items()
        if name in stored_core or not (_is_unused(tensor) or name.endswith(_WITHOUT_USE))
    }
    stored = {
        name: tuple(tensor.shape)
        for name, tensor in stored_core.items()
        if name in expected
        or (name.partition(".")[0] in modules and not name.endswith(_WITHOUT_USE) and not name.startswith(left_out))
    }
    if differences := first_differences(expected, stored, _SHOWN):
        raise UserError(f"{where}: weights of another network: {differences}")


def _is_unused(tensor: Tensor) -> bool:
    """Whether it is a parameter without influence on the embedding: a tower that was just built trains all others."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _projection_in(
    weights: Mapping[str, Tensor], held: Mapping[str, Tensor], projection: set[int], outer: str
) -> dict[str, Tensor]:
    """The tensors of the projection by their names in the file; empty where it has not all of them in their shapes."""
    named = {outer + name: tensor for name, tensor in held.items() if id(tensor) in projection}
    is_complete = all(name in weights and weights[name].shape == tensor.shape for name, tensor in named.items())
    return named if is_complete else {}
