"""The base of global contrastive losses: each sample's normaliser, averaged over the steps in which it was seen."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.objectives.pairs import Pairs
from vlm.objectives.sample_table import SampleTable
from vlm.objectives.state import RunFacts
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm

SIDES = ("image", "text")  # the columns of the table: of x among y, and of y among x


class GlobalContrast(PairTerm):
    """A loss of log(eps + s_i), where s_i stands for a mean over the whole data instead of one over the batch.

    With h_ij = s_ij - s_ii, the similarity of a negative less that of the positive, and the mean over an anchor's
    negatives in the batch,

        g_i = mean_j exp(h_ij / tau_i),    s_i <- (1 - gamma) s_i + gamma g_i

    and s_i = g_i for a sample that was not seen before. The gradient is d g_i / (eps + s_i), with s_i a constant: that
    of sum_j w_ij h_ij / tau_i under constant weights w_ij (SogCLR: Yuan et al., 2022). The table keeps log s_i, so that
    no exponential overflows, whatever the temperature; the authors keep s_i beside a running maximum, to the same end.
    """

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
        "gamma_decay_epochs": ("gamma_schedule", ("cosine",))
    }

    gamma: float = Field(default=0.8, gt=0, le=1, description="share of the batch in a sample's moving average")
    gamma_schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="cosine: from 1 in the first epoch down to gamma, by whole epochs"
    )
    gamma_decay_epochs: float | None = Field(
        default=None, gt=0, le=1e6, description="epochs until the cosine reaches gamma; null: half the run"
    )
    eps: float = Field(
        default=1e-14, ge=0, le=1, description="added to the average: samples below it lose their weight"
    )

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between[1:]))

    def gamma_at(self, step: int, facts: RunFacts) -> float:
        """The share of step `step` (0 is the first): constant, or FastCLIP's cosine by epochs."""
        epoch = step // facts.steps_per_epoch
        end = self.gamma_decay_epochs or facts.num_steps / facts.steps_per_epoch / 2
        if self.gamma_schedule == "constant" or epoch >= end:
            return self.gamma
        return self.gamma + (1 - self.gamma) * (1 + math.cos(math.pi * epoch / end)) / 2

    def averaged(
        self, old: Float[Tensor, " rows"], log_mean: Float[Tensor, " rows"], gamma: float
    ) -> Float[Tensor, " rows"]:
        """log of (1 - gamma) s + gamma g from log s (-inf: not seen before) and log g (-inf: no negatives)."""
        new = log_mean.detach()
        if gamma == 1:
            return torch.where(new.isneginf(), old, new)
        mixed = torch.logaddexp(old + math.log1p(-gamma), new + math.log(gamma))
        return torch.where(new.isneginf(), old, torch.where(old.isneginf(), new, mixed))

    def log_average(
        self, average: Float[Tensor, " rows"], log_mean: Float[Tensor, " rows"]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """log(eps + s) with the gradient d g / (eps + s), and g / (eps + s); 0 for rows without negatives."""
        some = ~log_mean.isneginf()
        floor = math.log(self.eps) if self.eps else -math.inf
        level = torch.where(some, torch.logaddexp(average, torch.full_like(average, floor)), 0.0)
        log_mean = torch.where(some, log_mean, 0.0)
        ratio = torch.where(some, (log_mean.detach() - level).exp(), 0.0)
        return level + ratio * (log_mean - log_mean.detach()), ratio


def table_of(step: PairStep) -> SampleTable:
    """The term's state, which is a table of samples."""
    assert isinstance(step.state, SampleTable)
    return step.state


def num_negatives(pairs: Pairs) -> Int64[Tensor, " rows"]:
    """How many pairs of the batch (of the group) are other samples than an own pair."""
    everyone = pairs.all_ids.sort().values
    same = torch.searchsorted(everyone, pairs.ids, right=True) - torch.searchsorted(everyone, pairs.ids)
    return len(everyone) - same


def log_mean_contrast(
    log_sum_exp: Float[Tensor, " rows"], positive: Float[Tensor, " rows"], count: Int64[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """log mean_j exp(h_ij / tau_i) from the negatives' log-sum-exp and the positive's logit; -inf without negatives."""
    return log_sum_exp - positive - count.clamp(min=1).to(log_sum_exp).log()
