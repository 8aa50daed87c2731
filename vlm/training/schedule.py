"""The learning rate as a pure function of the step."""

import math
from typing import Literal

from pydantic import Field

from vlm.config import Config
from vlm.duration import Duration


class ScheduleConfig(Config):
    """Linear warm-up, then a cosine to `final` times the peak rate, or the peak rate kept."""

    kind: Literal["cosine", "constant"] = Field(default="cosine", description="what follows the warm-up")
    warmup: Duration = Field(default=Duration(0, "steps"), description="length of the linear rise at the start")
    final: float = Field(default=0.0, ge=0, le=1, description="share of the peak rate that is left at the end")


def rate_factor(config: ScheduleConfig, step: int, warmup_steps: int, num_steps: int) -> float:
    """The share of the peak learning rate that step `step` (counted from 0) of `num_steps` takes."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.kind == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
