"""Optimizers by name: those that ship, and one's own as package.module:Class."""

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from vlm.registered import OrOnesOwn, reader, union_of
from vlm.training.optimizers import adafactor, adamw, adamw_8bit, lamb, muon  # noqa: F401 - they are registered there
from vlm.training.optimizers.base import OPTIMIZERS, OptimizerConfig

_DEFAULT = "adamw"

AnyOptimizer = Annotated[
    SerializeAsAny[OptimizerConfig],
    BeforeValidator(reader(OPTIMIZERS, _DEFAULT), json_schema_input_type=union_of(OPTIMIZERS)),
    OrOnesOwn(_DEFAULT),
]
