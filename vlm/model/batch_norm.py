"""Batch normalisation has no place in a model whose gradient must not depend on how a batch is split."""

from timm.layers.norm_act import freeze_batch_norm_2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlm.errors import UserError


def without_batch_norm(tower: nn.Module, name: str, *, freeze: bool, locked: bool = False) -> nn.Module:
    """The tower `name` with its batch norms frozen to their running statistics (in training mode too).

    Those of a tower that is `locked` whole are frozen too, or left to its lock. Raises UserError when there are batch
    norms that may not, or cannot, be frozen.
    """
    if not _batch_norms(tower):
        return tower
    if not (freeze or locked):
        raise UserError(
            f"the {name} tower normalises over the local batch (batch norm), so its gradient would depend on the "
            "number of ranks and micro-batches; set freeze_batch_norm: true, or take a tower with group or layer norm"
        )
    frozen: nn.Module = freeze_batch_norm_2d(tower)
    if (left := _batch_norms(frozen)) and not locked:
        raise UserError(f"freeze_batch_norm: the {name} tower has a batch norm that cannot be frozen: {left[0]}")
    return frozen


def _batch_norms(tower: nn.Module) -> list[str]:
    return [name for name, module in tower.named_modules() if isinstance(module, _BatchNorm)]
