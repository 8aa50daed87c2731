"""Tensors by name in safetensors files."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm.atomic import default_mode, flush_to_disk

_PIECE = 16 * 2**20  # bytes that are written, then hashed, while they are in the processor's cache or near it
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The kinds of numbers as safetensors' format calls them."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and flush it to the disk; unlike safetensors' own, not for the owner alone."""
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(default_mode())
    flush_to_disk(path)


def save_hashed(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write a safetensors file of contiguous tensors of the CPU, flushed to the disk; its size in bytes and SHA-256.

    The hash is made of what is written, piece by piece, so that nothing is read back; safetensors' own writer cannot.
    The lock of the interpreter is free meanwhile. The format: https://github.com/huggingface/safetensors#format.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # which aligns all of them
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, tensor in ordered:
        ends = [place, place + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": ends}
        place = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        beginning = memoryview(len(text).to_bytes(8, "little") + text)
        for content in (beginning, *(_bytes_of(tensor) for _, tensor in ordered)):
            for start in range(0, len(content), _PIECE):
                piece = content[start : start + _PIECE]
                file.write(piece)
                digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
