"""What a kind of optimizer is: its numbers, what it keeps of each parameter, and how it is built."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vlm.config import Config
from vlm.registry import Registry
from vlm.training.engines.options import LAYOUTS, EngineOptions, Layout
from vlm.training.optimizers.parameters import ParameterFacts
from vlm.training.optimizers.rates import LrDecay, LrScale

_FILE_NAME = re.compile("[a-z][a-z0-9_]*")  # of a checkpoint


class Moment(NamedTuple):
    """A tensor that an optimizer keeps of a parameter: its shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


class OptimizerConfig(Config, ABC):
    """The optimizer of a run; each kind adds its numbers and says how it is built.

    Its state of a parameter may be `step`, its count of updates, and the tensors named in `moments`: one number for
    each of the parameter's, unless `moments_of` says otherwise. Engines may flatten parameters, and cut them into
    parts, unless `layouts` names the layouts that an optimizer works in.

    Attributes:
        moments: names of the tensors that it keeps of parameters, which are in the checkpoint.
        remade: names of what else is in its state of a parameter, which `state_of` makes anew.
        layouts: the layouts of parameters and moments under which its update is right.
        communicates: whether its update of `rows` takes sums over the ranks.
        separates_hidden: whether hidden matrices are groups of their own, which have `hidden` true.
    """

    moments: ClassVar[tuple[str, ...]]
    remade: ClassVar[tuple[str, ...]] = ()
    layouts: ClassVar[frozenset[Layout]] = frozenset(LAYOUTS.values())
    communicates: ClassVar[bool] = False
    separates_hidden: ClassVar[bool] = False

    kind: str = Field(description="The optimizer: a name, or your own as package.module:Class.")
    lr: float = Field(default=1e-3, gt=0, le=10, description="peak learning rate")
    weight_decay: float = Field(
        default=0.2, ge=0, le=100, description="share of the rate by which weights shrink; not biases, norms or scales"
    )
    undecayed: tuple[str, ...] = Field(
        default=(),
        description='more parameters without weight decay: patterns of names, as in "*.positional_embedding"',
    )
    lr_scale: LrScale = Field(
        default=LrScale(), description="factors of the rate for each tower, at every step of the schedule"
    )
    lr_decay: LrDecay = Field(
        default=LrDecay(),
        description="factors of the rate for each block of a tower below the one before, from the top",
    )

    @model_validator(mode="after")
    def _says_what_it_keeps(self) -> "OptimizerConfig":
        moments = getattr(type(self), "moments", None)
        if not isinstance(moments, tuple):
            words = "has no `moments`: a tuple of the names of what it keeps of each parameter"
            raise ValueError(f"{type(self).__name__} {words}")  # noqa: TRY004 - pydantic wants this one
        if odd := [name for name in moments if not _FILE_NAME.fullmatch(name)]:
            words = "which is no file's name: small letters, digits and _ are, beginning with a letter"
            raise ValueError(f"{type(self).__name__} has the moment {odd[0]!r}, {words}")
        return self

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of groups of parameters, each of which has its `weight_decay`."""

    def require_installed(self) -> None:
        """Raise UserError where what the optimizer is built of is not installed."""

    def unfit_for(self, engine: str, layout: Layout, options: EngineOptions) -> str | None:
        """Words on why the optimizer would not be right under an engine; None where it is."""
        if layout not in self.layouts:
            able = [name for name, known in LAYOUTS.items() if known in self.layouts]
            return (
                f"optimizer.kind: {self.kind} works on whole tensors, of which engine {engine} has parts; it is for "
                f"engine: {', '.join(able)}"
            )
        if layout == "rows" and self.communicates and options.offload.parameters is not None:
            return (
                f"engine_options.offload.parameters: found {options.offload.parameters!r}; {self.kind} sums over the "
                "ranks, which what lies there cannot do; leave it out, or take another optimizer.kind"
            )
        return None

    def moments_of(self, parameter: ParameterFacts) -> Mapping[str, Moment]:
        """The tensors that it keeps of a parameter, by the names in `moments`.

        Of a parameter that is cut into rows, what has another shape than it is kept whole by every rank; an optimizer
        with such tensors does not work in the layout `flat`.
        """
        return {name: Moment(parameter.shape) for name in self.moments}

    def state_of(self, moments: Mapping[str, Tensor], num_updates: int, device: torch.device) -> dict[str, Any]:
        """The optimizer's state of a parameter with these moments, after so many updates."""
        return {"step": torch.tensor(float(num_updates), device=device), **moments}


OPTIMIZERS: Registry[type[OptimizerConfig]] = Registry("optimizer", OptimizerConfig)
