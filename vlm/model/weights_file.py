"""Files of weights, read without running anything that they contain."""

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlm.errors import UserError, reason

_SHOWN = 3
# Of torch.compile, FSDP and activation checkpointing; DDP's `module` is such a name at the beginning only.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def read_weights(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a torch file that holds nothing but tensors.

    Raises UserError, which begins with `where`, for other files, and for those that would have to run code of theirs.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with warnings.catch_warnings(action="ignore"):  # of what the file is like, in words for torch's developers
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler trip in any way: assertions, indices, encodings
        # torch's own words give advice on how to run it.
        words = "a pickle of other things" if isinstance(error, pickle.UnpicklingError) else reason(error)
        raise UserError(
            f"{where}: neither safetensors nor a torch file of plain tensors (others are not read, because "
            f"they can run code): {words}"
        ) from error
    return _only_tensors(where, content)


def left_out_words(where: str, names: Sequence[str]) -> list[str]:
    """A line on tensors of a file for which the tower has no place, such as a classifier; none where there are none."""
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{where}: left out, for the tower has no such part: {', '.join(names[:_SHOWN])}{more}"]


def _only_tensors(where: str, content: Any) -> dict[str, Tensor]:
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{where}: holds no named tensors")
    unwrapped = {_unwrapped(str(name)): tensor for name, tensor in weights.items()}
    if len(unwrapped) < len(weights):
        raise UserError(f"{where}: holds the same weights more than once, under the names of wrappers")
    for name, tensor in unwrapped.items():
        _require_numbers(f"{where}: {name!r:.200}", tensor)
    return unwrapped


def _require_numbers(where: str, tensor: Tensor) -> None:
    """Raise UserError for a tensor that would fill a model with what is no number: its figures would all be 0."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
        raise UserError(f"{where} is no plain tensor of real numbers")
    if tensor.is_floating_point() and not tensor.float().isfinite().all():
        raise UserError(f"{where} holds what is no finite number")


def _unwrapped(name: str) -> str:
    """A tensor's name without those of wrappers, which stand before the name or before that of a module in it."""
    first, *rest = [word for word in name.split(".") if word not in _WRAPPERS]
    while first == "module" and rest:
        first, *rest = rest
    return ".".join([first, *rest])
