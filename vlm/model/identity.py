"""The identity of a model's weights, wherever they lie and however they are stored."""

import hashlib

import torch
from torch import nn

_DIGITS = 16


def weights_identity(model: nn.Module) -> str:
    """16 hexadecimal digits of the SHA-256 of all weights by name: the same for the same numbers under these names.

    The weights have to be whole, which those of a model that an engine shards are not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]
