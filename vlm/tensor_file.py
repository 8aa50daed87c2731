"""Tensors by name in safetensors files."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vlm.atomic import default_mode, flush_to_disk


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and flush it to the disk; unlike safetensors' own, not for the owner alone."""
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(default_mode())
    flush_to_disk(path)
