"""Contrast of whitened embeddings: dimensions in random groups, each group with the identity as its covariance."""

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from vlm.distributed.row_group import RowGroup
from vlm.errors import EveryRankError
from vlm.objectives.counter_rng import uniforms
from vlm.objectives.registry import TERMS
from vlm.objectives.state import RunFacts
from vlm.objectives.step import PairStep
from vlm.objectives.term import PairTerm
from vlm.objectives.terms.clip import clip
from vlm.objectives.terms.inverse_root import inverse_root

_SMALLEST = 1e-12  # variance that is added to a group which has none
_TOWERS = ("image", "text")


@TERMS.register("whitening")
class Whitening(PairTerm):
    """Shuffled group whitening (WhitenedCSE: Zhuo et al., 2023) of images, texts, or both, then the loss of `clip`.

    value = 1/V sum_v clip(h(w(x; p_v)), h(w(y; q_v)))

    with V the field `views` and w(x; p) = x's dimensions, in the order p, cut into groups of `group_size`; of each
    group the rows less their mean, times (S + e tr(S) / d I)^-1/2, with S the group's covariance over the *global*
    batch, d its size and e the field `epsilon`; then back to the old order and, after the head h, to length 1. Every
    view of every tower shuffles anew (by seed, step, view). h is a dense layer with tanh that trains with the run and
    is dropped after it (`head: false`: none). What is exported and evaluated are the embeddings x, y themselves.

    The paper contrasts one sentence with itself under dropout; here the two modalities are each other's views.
    Covariances are summed and their roots taken in float64; with fewer rows than `group_size` + 1 they have no full
    rank, and e bounds what is divided by. Twice as many rows as dimensions in a group are a good choice.

    Raises EveryRankError where `group_size` does not divide the embedding's dimensions.
    """

    views: int = Field(default=2, gt=0, le=64, description="shuffles of each batch")
    group_size: int = Field(default=8, gt=0, le=65536, description="dimensions whitened together; 1 standardises each")
    epsilon: float = Field(
        default=1e-4, gt=0, le=1, description="added to the covariance, in mean variances of its group"
    )
    image: bool = Field(default=True, description="whiten images")
    text: bool = Field(default=True, description="whiten texts")
    head: bool = Field(default=True, description="a dense layer with tanh behind the whitening, dropped after training")

    @model_validator(mode="after")
    def _something_to_whiten(self) -> "Whitening":
        if not (self.image or self.text):
            raise ValueError("whiten images, texts or both: `image` and `text` are false")
        return self

    def parameters(self, facts: RunFacts) -> dict[str, Tensor]:  # noqa: D102
        if facts.dim % self.group_size:
            raise EveryRankError(
                f"objective: whitening.group_size: groups of {self.group_size} do not fill the embedding's {facts.dim} "
                "dimensions"
            )
        if not self.head:
            return {}
        generator = torch.Generator().manual_seed(facts.seed)
        bound = facts.dim**-0.5
        weights = {f"{tower}_weight": torch.empty(facts.dim, facts.dim) for tower in _TOWERS}
        for weight in weights.values():
            weight.uniform_(-bound, bound, generator=generator)
        return weights | {f"{tower}_bias": torch.zeros(facts.dim) for tower in _TOWERS}

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        pairs = step.pairs
        total = pairs.x.new_zeros(())
        for view in range(self.views):
            x = self._view(step, "image", pairs.x, view if self.image else None)
            y = self._view(step, "text", pairs.y, view if self.text else None)
            total = total + clip(pairs.with_values(x, y, self.between[1:]), step.logit_scale)
        return total / self.views

    def _view(self, step: PairStep, tower: str, rows: Tensor, view: int | None) -> Float[Tensor, "rows dim"]:
        """The rows behind the head, whitened in a shuffle of their own unless `view` is None."""
        if view is not None:
            order = _shuffle(step, tower, view, rows.shape[1])
            rows = whitened(rows, order, self.group_size, self.epsilon, step.pairs.ranks)
        if self.head:
            weight, bias = (step.parameters[f"{tower}_{name}"].to(rows.dtype) for name in ("weight", "bias"))
            rows = (rows @ weight.T + bias).tanh()
        return normalize(rows, dim=1)


def whitened(
    rows: Float[Tensor, "rows dim"], order: Int64[Tensor, " dim"], group_size: int, epsilon: float, ranks: RowGroup
) -> Float[Tensor, "rows dim"]:
    """`rows` with each group of `group_size` dimensions, taken in `order`, centred and decorrelated over all ranks.

    See `Whitening` for the formula. Collective: dim x (group_size + 1) numbers are summed.
    """
    groups = rows[:, order].double().unflatten(1, (-1, group_size))
    centred = groups - ranks.sum(groups.sum(0)) / ranks.num_rows
    covariance = ranks.sum(torch.einsum("ngd,nge->gde", centred, centred)) / ranks.num_rows
    ridge = epsilon * covariance.diagonal(dim1=1, dim2=2).mean(1) + _SMALLEST
    regular = covariance + ridge[:, None, None] * torch.eye(group_size, dtype=covariance.dtype, device=rows.device)
    made = torch.einsum("ngd,gde->nge", centred, inverse_root(regular)).flatten(1).to(rows.dtype)
    return made[:, order.argsort()]


def _shuffle(step: PairStep, tower: str, view: int, dim: int) -> Int64[Tensor, " dim"]:
    """An order of the dimensions, the same on every rank, another for each view, tower and step."""
    number = torch.tensor([view], device=step.pairs.x.device)
    return uniforms(step.seed, step.step, number, f"whitening/{tower}", dim)[0].argsort()
