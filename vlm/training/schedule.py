"""The learning rate as a pure function of the step."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from vlm.config import Config
from vlm.duration import Duration, Stretch
from vlm.errors import EveryRankError
from vlm.registered import OrOnesOwn, reader, union_of
from vlm.registry import Registry

_DEFAULT = "cosine"


class Cooldown(Config):
    """The way to zero at the end of a run, from what the schedule has come to.

    Behind a constant rate it is the schedule of warm-up, stable rate and decay (WSD: Hu et al., 2024), with a straight
    line (Zhai et al., 2022) or 1 - sqrt (Hägele et al., 2024): a run may be made longer from any step before it.
    """

    last: Stretch = Field(description='length: the last "2000 steps", "1M samples" or "20%" of the run')
    shape: Literal["linear", "1-sqrt"] = Field(
        default="linear", description="a straight line, or one minus the root of what is done of it"
    )

    def factor(self, progress: float) -> float:
        """The share that is left when `progress` (0 to 1) of the cool-down is done."""
        return 1 - (math.sqrt(progress) if self.shape == "1-sqrt" else progress)


class Schedule(Config, ABC):
    """The learning rate over a run, as shares of its peak.

    A linear warm-up, then what the kind of schedule says, then the cool-down if there is one.
    """

    kind: str = Field(description="The schedule: a name, or your own as package.module:Class.")
    warmup: Duration = Field(default=Duration(0, "steps"), description="length of the linear rise at the start")
    cooldown: Cooldown | None = Field(default=None, description="the last stretch of the run, down to zero; null: none")

    @model_validator(mode="after")
    def _leaves_something_to_cool(self) -> "Schedule":
        if self.cooldown is not None and self.factor(1.0) == 0:
            raise ValueError(f"cooldown begins where {self.kind} has come to, which is 0; say final, as in final: 0.1")
        return self

    @abstractmethod
    def factor(self, progress: float) -> float:
        """The share of the peak rate when `progress` (0 to 1) of the steps between warm-up and cool-down is done."""


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
    """The learning rate of each step of a run of `num_steps`: the first ones warm up, the last ones cool down."""

    schedule: Schedule
    peak: float
    warmup_steps: int
    num_steps: int
    cooldown_steps: int = 0

    @staticmethod
    def of_run(
        schedule: Schedule, peak: float, *, global_batch: int, num_samples: int, num_steps: int
    ) -> "LearningRate":
        """The learning rate of a run, an epoch of which has `num_samples`.

        Raises EveryRankError for a cool-down that does not fit behind the warm-up.
        """
        warmup_steps = schedule.warmup.steps(global_batch, num_samples)
        if schedule.cooldown is None:
            return LearningRate(schedule, peak, warmup_steps, num_steps)
        cooldown_steps = schedule.cooldown.last.steps(global_batch, num_samples, num_steps)
        if warmup_steps + cooldown_steps > num_steps:
            raise EveryRankError(
                f"schedule.cooldown.last: found {schedule.cooldown.last}, which is {cooldown_steps:,} steps; behind "
                f"{warmup_steps:,} of warm-up the run has {max(0, num_steps - warmup_steps):,}"
            )
        return LearningRate(schedule, peak, warmup_steps, num_steps, cooldown_steps)

    def __call__(self, step: int) -> float:
        """The rate that step `step`, counted from 0, takes."""
        if step < self.warmup_steps:
            return self.peak * ((step + 1) / self.warmup_steps)
        cooldown_start = self.num_steps - self.cooldown_steps
        progress = (step - self.warmup_steps) / max(1, cooldown_start - self.warmup_steps)
        rate = self.peak * self.schedule.factor(min(1.0, progress))
        if self.schedule.cooldown is None or step < cooldown_start:
            return rate
        return rate * self.schedule.cooldown.factor(min(1.0, (step - cooldown_start) / self.cooldown_steps))
