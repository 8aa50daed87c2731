"""Adafactor, which keeps a row and a column of numbers of a matrix."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from vlm.training.engines.options import Layout
from vlm.training.optimizers.base import OPTIMIZERS, Moment, OptimizerConfig
from vlm.training.optimizers.parameters import ParameterFacts
from vlm.training.optimizers.wholes import OnWholes


@OPTIMIZERS.register("adafactor")
class Adafactor(OptimizerConfig):
    """Adafactor (Shazeer & Stern, 2018) as torch has it: nearly no memory for moments, and none of the first.

    The rate is relative: a step is in proportion to the root mean square of a tensor's weights (of at least
    `least_scale`), and the rate is at most one over the root of the number of updates. What it keeps are means over
    rows and columns of whole tensors.
    """

    moments: ClassVar[tuple[str, ...]] = ("row_var", "col_var", "variance")
    layouts: ClassVar[frozenset[Layout]] = frozenset({"whole", "rows"})
    communicates: ClassVar[bool] = True

    kind: Literal["adafactor"] = Field(description="second moments of rows and columns alone")
    beta2_decay: float = Field(
        default=-0.8, ge=-10, le=0, description="update t forgets the share t to this power of the squares before it"
    )
    least_scale: float = Field(default=1e-3, gt=0, le=1, description="least root mean square of weights that counts")
    clip: float = Field(default=1.0, ge=1, le=1000, description="largest root mean square of a step before the rate")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:  # noqa: D102
        return _Adafactor(groups, lr=self.lr, beta2_decay=self.beta2_decay, eps=(None, self.least_scale), d=self.clip)

    def moments_of(self, parameter: ParameterFacts) -> Mapping[str, Moment]:  # noqa: D102
        shape = parameter.shape
        if len(shape) < 2:
            return {"variance": Moment(shape)}
        return {"row_var": Moment((*shape[:-1], 1)), "col_var": Moment((*shape[:-2], 1, shape[-1]))}


class _Adafactor(OnWholes, torch.optim.Adafactor):
    on_wholes = torch.optim.Adafactor
