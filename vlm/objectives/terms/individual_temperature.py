"""A temperature for each image and each text, learned beside the model by a robust loss over the whole data."""

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.sample_table import SampleTable
from vlm.objectives.state import RunFacts
from vlm.objectives.step import PairStep
from vlm.objectives.terms.global_contrast import SIDES, GlobalContrast, log_mean_contrast, num_negatives, table_of
from vlm.similarity.softmax_moments import SoftmaxStatistics, softmax_statistics

_LOG_MEAN, _TEMPERATURE, _MOMENTUM = "log_mean", "temperature", "momentum"


@TERMS.register("individual_temperature")
class IndividualTemperature(GlobalContrast):
    """iSogCLR: the robust global contrastive loss with individual temperatures (Qiu et al., 2023).

    value = 1/(2N) sum_i [ F_i + F'_i ],    F_i = tau_i (log(eps + s_i) + rho)

    of each image against texts and of each text against images, s_i being the moving average of `GlobalContrast` (the
    paper adds the two directions: weight 2). F_i is the worst case over reweightings of the negatives whose divergence
    from uniform is bounded by rho: a sample with many similar negatives gets a high temperature, one with few a low
    one. Towers receive d F_i = sum_j w_ij d h_ij / n with constant weights w_ij = exp(h_ij / tau_i) / (eps + s_i), n
    being the number of negatives. A step moves the temperatures of its samples:

        d F_i / d tau_i = log(eps + s_i) + rho - sum_j w_ij (h_ij / tau_i) / n,   clipped to +- gradient_limit
        u_i <- (1 - momentum) u_i + momentum d F_i / d tau_i
        tau_i <- tau_i - rate u_i, within [temperature_min, temperature_max]

    The derivative is about rho less the divergence of the softmax over negatives from uniform, which is at most log(n):
    with rho above log(n) and gamma near 1, temperatures can only fall. Choose rho with the batch (log 63 is 4.1).

    The model's logit scale is not read. The pair itself is no negative: the authors' code lets it into the sum of n + 1
    terms that it divides by n. The first visit's average is the batch's, as in the code's first epoch. Every sample has
    six numbers in the checkpoint; rows without negatives count 0 and change nothing.
    """

    rho: float = Field(default=8.0, ge=0, le=1000, description="bound of the divergence; the authors take 6 for CC3M")
    temperature_init: float = Field(default=0.01, gt=0, le=100, description="temperature of a sample not seen before")
    temperature_min: float = Field(default=5e-3, gt=0, le=100, description="lowest temperature")
    temperature_max: float = Field(default=1.0, gt=0, le=100, description="highest temperature")
    rate: float = Field(default=0.03, ge=0, le=100, description="learning rate of temperatures (eta)")
    momentum: float = Field(default=0.9, gt=0, le=1, description="share of the newest derivative in its average (beta)")
    gradient_limit: float = Field(default=5.0, gt=0, le=1e6, description="bound of a temperature's derivative")

    @model_validator(mode="after")
    def _ordered(self) -> "IndividualTemperature":
        if not self.temperature_min <= self.temperature_init <= self.temperature_max:
            raise ValueError(
                f"temperature_init: {self.temperature_init} is not within "
                f"[{self.temperature_min}, {self.temperature_max}], temperature_min and temperature_max"
            )
        return self

    def start(self, facts: RunFacts) -> SampleTable:  # noqa: D102
        defaults = {_LOG_MEAN: float("-inf"), _TEMPERATURE: self.temperature_init, _MOMENTUM: 0.0}
        return SampleTable(facts, {f"{side}_{name}": value for side in SIDES for name, value in defaults.items()})

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        table, pairs = table_of(step), step.pairs
        gamma = self.gamma_at(step.step, table.facts)
        old = {name: column.to(pairs.x) for name, column in table.read(pairs.ids).items()}
        count, positive = num_negatives(pairs), pairs.positive_similarity()
        total = torch.zeros_like(positive)
        new: dict[str, Tensor] = {}
        for side, statistics in zip(SIDES, self._statistics(pairs, old), strict=True):
            temperature = old[f"{side}_{_TEMPERATURE}"]
            log_mean = log_mean_contrast(statistics.log_sum_exp, positive / temperature, count)
            average = self.averaged(old[f"{side}_{_LOG_MEAN}"], log_mean, gamma)
            log_average, ratio = self.log_average(average, log_mean)
            total = total + torch.where(count > 0, temperature * (log_average + self.rho), 0.0)
            mean_contrast = (statistics.mean - positive.detach()) / temperature
            derivative = log_average.detach() + self.rho - ratio * mean_contrast
            new[f"{side}_{_LOG_MEAN}"] = average
            new[f"{side}_{_MOMENTUM}"], new[f"{side}_{_TEMPERATURE}"] = self._moved(
                torch.where(count > 0, derivative, 0.0), old[f"{side}_{_MOMENTUM}"], temperature, count > 0
            )
        table.propose(new)
        return pairs.mean(total / 2)

    def _statistics(self, pairs: Pairs, old: dict[str, Tensor]) -> tuple[SoftmaxStatistics, SoftmaxStatistics]:
        """Both directions' log-sum-exp over negatives, and the negatives' mean similarity under its softmax."""
        x_scales, y_scales = (1 / old[f"{side}_{_TEMPERATURE}"] for side in SIDES)
        return softmax_statistics(
            pairs.x,
            pairs.y_columns,
            pairs.ranks,
            (x_scales, pairs.ranks.gather_constant(y_scales)),
            pairs.other_samples,
            matmul_dtype=pairs.matmul_dtype,
        )

    def _moved(
        self, derivative: Tensor, momentum: Tensor, temperature: Tensor, some: Tensor
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Momentum and temperature after a step; as they were where there are no negatives."""
        clipped = derivative.clamp(-self.gradient_limit, self.gradient_limit)
        average = (1 - self.momentum) * momentum + self.momentum * clipped
        moved = (temperature - self.rate * average).clamp(self.temperature_min, self.temperature_max)
        return torch.where(some, average, momentum), torch.where(some, moved, temperature)
