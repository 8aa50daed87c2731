"""Low-rank adapters of the linear maps of a language model's layers (LoRA: Hu et al., 2022), by peft."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from vlm.errors import EveryRankError, nearest
from vlm.model.language_model_config import LoraConfig


def adapters_of(layers: Sequence[nn.Module], config: LoraConfig, targets: Sequence[str]) -> list[nn.Module]:
    """Put adapters beside the maps of these names in each layer; the new parts, of which all parameters train.

    They add nothing at the start. Raises EveryRankError for names that no linear map of the layers has.
    """
    import peft  # a second, for those alone who adapt

    maps = {
        name.rpartition(".")[2]: part
        for name, part in layers[0].named_modules()
        if isinstance(part, nn.Linear | Conv1D)
    }
    for target in targets:
        if target not in maps:
            raise EveryRankError(
                f"model.captioner.language_model.lora.targets: unknown map {target!r:.60}; {nearest(target, maps)}"
            )
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(targets),
        fan_in_fan_out=isinstance(maps[targets[0]], Conv1D),
    )
    peft.inject_adapter_in_model(options, nn.ModuleList(layers))
    adapted: list[Any] = [part for layer in layers for part in layer.modules() if hasattr(part, "lora_A")]
    return [new for part in adapted for new in (part.lora_A, part.lora_B, part.lora_dropout)]


def merge(layers: nn.Module) -> None:
    """Add each adapter to the map that it stands beside, for good: the same function, by the map alone."""
    adapted = [(name, part) for name, part in layers.named_modules() if hasattr(part, "lora_A")]
    for name, part in adapted:
        library: Any = part
        library.merge()
        parent, _, last = name.rpartition(".")
        setattr(layers.get_submodule(parent), last, library.get_base_layer())
