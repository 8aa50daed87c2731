"""FastCLIP: global contrastive losses with one temperature, or one a sample."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from vlm.objectives.registry import TERMS
from vlm.objectives.sample_table import SampleTable
from vlm.objectives.state import RunFacts
from vlm.objectives.step import PairStep
from vlm.objectives.terms.global_contrast import SIDES, log_mean_contrast, num_negatives, table_of
from vlm.objectives.terms.individual_temperature import IndividualTemperature

_RHO = {"v2": 7.0, "v3": 6.5}


@TERMS.register("fast_clip")
class FastClip(IndividualTemperature):
    """FastCLIP v0 to v3 (Wei et al., 2024): moving averages whose gamma falls by a cosine from 1.

    With s_i the moving average of `GlobalContrast`, of images against texts and of texts against images:

    - v0: value = 1/(2N) sum_i log(eps + s_i), the temperature being the model's (1 / logit scale), learned with it;
    - v1: value = 1/(2N) sum_i tau log(eps + s_i), the temperature constant: `temperature` (SogCLR, Yuan et al., 2022,
      with gamma_schedule constant and gamma 0.1);
    - v2: `IndividualTemperature` with these defaults. (The authors' code divides a temperature's step by a second
      moment; here iSogCLR's own step is taken.)
    - v3: value = 1/(2N) sum_i tau (log(eps + s_i) + rho), the temperature tau being the model's, learned with it.

    The sum is over both directions; the paper adds them without the half: weight 2. In v3 a gradient reaches tau by the
    factor and by s_i, as in the paper. (The authors' code takes the second at twice the weight of all the rest.)

    Temperatures learn at other rates there: v3's at one of its own (the authors' script: 2e-4 beside the model's 1e-3,
    constant after the warm-up, lowered at a threshold of tau), here as the logarithm of the logit scale with
    `optimizer.lr` and its schedule; v2's at 0.0133 by the script, here at `rate`, whose default is iSogCLR's 0.03.
    """

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
        "gamma_decay_epochs": ("gamma_schedule", ("cosine",)),
        "rho": ("version", ("v2", "v3")),
        "temperature": ("version", ("v1",)),
        **dict.fromkeys(
            ("temperature_init", "temperature_min", "temperature_max", "rate", "momentum", "gradient_limit"),
            ("version", ("v2",)),
        ),
    }

    version: Literal["v0", "v1", "v2", "v3"] = Field(default="v3", description="which of the four")
    gamma: float = Field(default=0.2, gt=0, le=1, description="share of the batch in the average, after the decay")
    gamma_schedule: Literal["constant", "cosine"] = Field(
        default="cosine", description="cosine: from 1 in the first epoch down to gamma, by whole epochs"
    )
    rho: float = Field(
        default=6.5, ge=0, le=1000, description="weight of the temperature itself; v2: 7.0; not in v0 and v1"
    )
    temperature: float = Field(default=0.07, gt=0, le=100, description="v1's constant temperature")
    temperature_init: float = Field(
        default=0.03, gt=0, le=100, description="v2: temperature of a sample not seen before"
    )
    temperature_min: float = Field(default=0.01, gt=0, le=100, description="v2: lowest temperature")

    @model_validator(mode="before")
    @classmethod
    def _rho_of_version(cls, options: Any) -> Any:
        version = options.get("version") if isinstance(options, dict) else None
        if isinstance(version, str) and version in _RHO:
            return {"rho": _RHO[version], **options}
        return options

    def start(self, facts: RunFacts) -> SampleTable:  # noqa: D102
        if self.version == "v2":
            return super().start(facts)
        return SampleTable(facts, {side: float("-inf") for side in SIDES})

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        if self.version == "v2":
            return super().__call__(step)
        pairs = step.pairs
        scale = pairs.x.new_tensor([1 / self.temperature]) if self.version == "v1" else step.logit_scale
        table = table_of(step)
        gamma = self.gamma_at(step.step, table.facts)
        old = table.read(pairs.ids)
        positive, *both_negatives = pairs.infonce_statistics(scale)
        count = num_negatives(pairs)
        total = torch.zeros_like(positive)
        new: dict[str, Tensor] = {}
        for side, log_sum_exp in zip(SIDES, both_negatives, strict=True):
            log_mean = log_mean_contrast(log_sum_exp, positive, count)
            new[side] = self.averaged(old[side].to(log_mean), log_mean, gamma)
            log_average, _ = self.log_average(new[side], log_mean)
            total = total + torch.where(count > 0, self._loss(log_average, scale), 0.0)
        table.propose(new)
        return pairs.mean(total / 2)

    def _loss(self, log_average: Float[Tensor, " rows"], scale: Float[Tensor, "1"]) -> Float[Tensor, " rows"]:
        if self.version == "v0":
            return log_average
        return (log_average + (self.rho if self.version == "v3" else 0.0)) / scale
