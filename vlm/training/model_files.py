"""The small files that a model is made of beside its weights (configurations, a tokenizer), kept in its checkpoints."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.writer import Group

MODEL_FILES = "files"


def file_group(files: Mapping[str, bytes]) -> Group:
    """The files as a group for `write_checkpoint`: the bytes of each are a tensor of its name."""
    tensors = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in files.items()}
    return {name: tensor.numel() for name, tensor in tensors.items()}, tensors.__getitem__


def files_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files in a checkpoint by name; a model that needs none has none."""
    return {name: _content(tensor) for name, tensor in checkpoint.tensors(MODEL_FILES).items()}


def _content(tensor: Tensor) -> bytes:
    return tensor.to(torch.uint8).numpy().tobytes()
