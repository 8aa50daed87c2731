"""The learning rate as a pure function of the step."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from vlm.config import Config
from vlm.duration import Duration
from vlm.registered import OrOnesOwn, reader, union_of
from vlm.registry import Registry

_DEFAULT = "cosine"


class Schedule(Config, ABC):
    """The learning rate over a run, as shares of its peak: a linear warm-up, then what the kind of schedule says."""

    kind: str = Field(description="The schedule: a name, or your own as package.module:Class.")
    warmup: Duration = Field(default=Duration(0, "steps"), description="length of the linear rise at the start")

    @abstractmethod
    def factor(self, progress: float) -> float:
        """The share of the peak rate when `progress` (0 to 1) of the steps after the warm-up is done."""


SCHEDULES: Registry[type[Schedule]] = Registry("schedule", Schedule)


@SCHEDULES.register("cosine")
class CosineSchedule(Schedule):
    """Half a cosine from the peak rate to `final` of it (SGDR: Loshchilov & Hutter, 2017, eq. 5, without restarts)."""

    kind: Literal["cosine"] = Field(default="cosine", description="half a cosine down")
    final: float = Field(default=0.0, ge=0, le=1, description="share of the peak rate that is left at the end")

    def factor(self, progress: float) -> float:  # noqa: D102
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@SCHEDULES.register("linear")
class LinearSchedule(Schedule):
    """A straight line from the peak rate to `final` of it."""

    kind: Literal["linear"] = Field(description="a straight line down")
    final: float = Field(default=0.0, ge=0, le=1, description="share of the peak rate that is left at the end")

    def factor(self, progress: float) -> float:  # noqa: D102
        return 1 - (1 - self.final) * progress


@SCHEDULES.register("constant")
class ConstantSchedule(Schedule):
    """The peak rate, kept."""

    kind: Literal["constant"] = Field(description="the peak rate to the end")

    @model_validator(mode="before")
    @classmethod
    def _without_final(cls, given: Any) -> Any:
        """Runs of version 0.1.0 wrote the key down, at 0, though it means nothing here."""
        if isinstance(given, dict) and given.get("final") == 0 and not isinstance(given["final"], bool):
            return {name: value for name, value in given.items() if name != "final"}
        return given

    def factor(self, progress: float) -> float:  # noqa: ARG002, D102
        return 1.0


AnySchedule = Annotated[
    SerializeAsAny[Schedule],
    BeforeValidator(reader(SCHEDULES, _DEFAULT), json_schema_input_type=union_of(SCHEDULES)),
    OrOnesOwn(_DEFAULT),
]


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of each step of a run of `num_steps`, the first `warmup_steps` of which warm up."""

    schedule: Schedule
    peak: float
    warmup_steps: int
    num_steps: int

    def __call__(self, step: int) -> float:
        """The rate that step `step`, counted from 0, takes."""
        if step < self.warmup_steps:
            return self.peak * ((step + 1) / self.warmup_steps)
        progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.peak * self.schedule.factor(min(1.0, progress))
