"""The identity of weights, wherever they lie and in whatever order they are stored."""

from collections.abc import Mapping
from hashlib import blake2b

from torch import Tensor, nn

_DIGEST_BYTES = 16


def weights_identity(model: nn.Module) -> str:
    """The identity of all of a model's weights, which have to be whole: an engine may have sharded them."""
    return tensors_identity(model.state_dict())


def tensors_identity(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and values in fp32, whatever the order and the device."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for name in sorted(tensors):
        values = tensors[name].detach().float().cpu().contiguous()
        digest.update(f"{name}\n{list(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
