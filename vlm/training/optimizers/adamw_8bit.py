"""AdamW with moments of 8 bits."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vlm.errors import EveryRankError, reason
from vlm.training.engines.options import Layout
from vlm.training.optimizers.base import OPTIMIZERS, Moment, OptimizerConfig
from vlm.training.optimizers.parameters import ParameterFacts

_LEAST = 4096  # elements of a tensor whose moments are kept in 8 bits
_BLOCK = 256  # elements that have one scale


@OPTIMIZERS.register("adamw_8bit")
class AdamW8bit(OptimizerConfig):
    """AdamW whose moments have 8 bits each and one scale for 256 (Dettmers et al., 2022), by bitsandbytes.

    Those of small tensors (norms, biases) stay in 32 bits. What it keeps is of whole tensors, which engines that shard
    do not have.
    """

    moments: ClassVar[tuple[str, ...]] = ("state1", "state2", "absmax1", "absmax2")
    remade: ClassVar[tuple[str, ...]] = ("qmap1", "qmap2")
    layouts: ClassVar[frozenset[Layout]] = frozenset({"whole"})

    kind: Literal["adamw_8bit"] = Field(description="AdamW with moments of 8 bits, by bitsandbytes (vlm[8bit])")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(default=0.98, ge=0, lt=1, description="decay of the mean of their squares")
    eps: float = Field(default=1e-6, gt=0, le=1, description="added to the root of that mean")

    def require_installed(self) -> None:  # noqa: D102
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise EveryRankError(
                f"optimizer.kind: found adamw_8bit, which is bitsandbytes' ({reason(error)}); pip install 'vlm[8bit]'"
            ) from None

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:  # noqa: D102
        self.require_installed()
        import bitsandbytes

        betas = (self.beta1, self.beta2)
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            groups, lr=self.lr, betas=betas, eps=self.eps, min_8bit_size=_LEAST
        )
        return optimizer

    def moments_of(self, parameter: ParameterFacts) -> Mapping[str, Moment]:  # noqa: D102
        size = math.prod(parameter.shape)
        if size < _LEAST:
            return {name: Moment(parameter.shape) for name in ("state1", "state2")}
        eight = {name: Moment(parameter.shape, torch.uint8) for name in ("state1", "state2")}
        return eight | {name: Moment((-(-size // _BLOCK),)) for name in ("absmax1", "absmax2")}

    def state_of(self, moments: Mapping[str, Tensor], num_updates: int, device: torch.device) -> dict[str, Any]:
        """Without an update yet, nothing: bitsandbytes begins by itself."""
        if num_updates == 0:
            return {}
        state: dict[str, Any] = {"step": num_updates, **moments}
        if "absmax1" in moments:
            from bitsandbytes.functional import create_dynamic_map

            state["qmap1"] = create_dynamic_map(signed=True).to(device)
            state["qmap2"] = create_dynamic_map(signed=False).to(device)
        return state
