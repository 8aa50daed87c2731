"""Several heads, each pair of embeddings with a temperature of its own, by maximum likelihood."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import linear, normalize

from vlm.errors import EveryRankError
from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.state import RunFacts
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.listed_pairs import line_sums, listed_similarities
from vlm.similarity.top_k import top_negatives


@TERMS.register("multi_head")
class MultiHead(PairTerm):
    """Adaptive multi-head contrastive learning (AMCL: Wang et al., 2024, equations 2.1, 3 and 5).

    The embedding is cut into C heads (`model.image_head: {heads: C}` makes them), each brought to length 1. Head c of
    an image meets head c of a text alone. Per head, and per row of either modality,

        -s_+ / t_+ + mean_k s_k / t_k + b [ d/2 log t_+ + 1 / t_+ - sum_k (log t_k + 1 / t_k) ]

    with s cosines, d the width of a head, b the field `beta`, and k over the row's `hardest` negatives by cosine. The
    temperature of a pair is t(u, v) = lo + (hi - lo) sigmoid(-<f(u), f(v)>) with one network f (two layers, ReLU) for
    all heads and both modalities, learned with the run; lo and hi are `temperature_min` and `temperature_max`. The two
    directions are averaged, heads are summed. There is no softmax here, and only lo bounds the value from below.

    The logit scale takes no part. O(n N D) operations to find the negatives; with a ring, all columns are gathered.

    Raises EveryRankError where `heads` does not divide the embedding's dimensions.
    """

    heads: int = Field(default=3, gt=0, le=1024, description="into so many equal parts the embedding is cut")
    hardest: int = Field(
        default=100, gt=0, le=2**24, description="negatives of each row that count; all where there are fewer"
    )
    beta: float = Field(default=0.01, ge=0, le=1e6, description="weight of what keeps temperatures from the ends")
    temperature_min: float = Field(default=1e-5, gt=0, le=100, description="least temperature")
    temperature_max: float = Field(default=2.0, gt=0, le=100, description="largest temperature")
    hidden: int = Field(default=128, gt=0, le=65536, description="width of the temperature network")

    @model_validator(mode="after")
    def _ordered(self) -> "MultiHead":
        if self.temperature_min > self.temperature_max:
            raise ValueError(
                f"temperature_min {self.temperature_min:g} is above temperature_max {self.temperature_max:g}"
            )
        return self

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between))

    def parameters(self, facts: RunFacts) -> dict[str, Tensor]:  # noqa: D102
        if facts.dim % self.heads:
            raise EveryRankError(
                f"objective: multi_head.heads: {self.heads} heads do not divide the embedding's {facts.dim} dimensions"
            )
        width = facts.dim // self.heads
        generator = torch.Generator().manual_seed(facts.seed)
        weights = {"inner_weight": torch.empty(self.hidden, width), "outer_weight": torch.empty(width, self.hidden)}
        for weight in weights.values():
            bound = weight.shape[1] ** -0.5
            weight.uniform_(-bound, bound, generator=generator)
        return weights | {"inner_bias": torch.zeros(self.hidden), "outer_bias": torch.zeros(width)}

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        pairs = step.pairs
        losses = pairs.x.new_zeros(len(pairs.x))
        for x, y, all_x, all_y in self._heads(pairs):
            losses = losses + self._row_losses(x, y, all_y, step) + self._row_losses(y, x, all_x, step)
        return pairs.mean(losses / 2)

    def _heads(self, pairs: Pairs) -> Iterator[tuple[Tensor, ...]]:
        """Each head of this rank's x and y, and of all ranks'."""
        width = pairs.x.shape[1] // self.heads
        heads = [
            [normalize(head, dim=1) for head in rows.split(width, dim=1)]
            for rows in (pairs.x, pairs.y, pairs.all_x, pairs.all_y)
        ]
        yield from zip(*heads, strict=True)

    def _row_losses(self, rows: Tensor, partners: Tensor, columns: Tensor, step: PairStep) -> Float[Tensor, " rows"]:
        """One direction of one head."""
        nearest, places = top_negatives(rows.detach(), columns.detach(), self.hardest, step.pairs.other_samples)
        counted = nearest.isfinite()
        row_places, column_places = counted.nonzero()[:, 0], places[counted]
        row_keys, column_keys = self._network(rows, step), self._network(columns, step)
        negatives = listed_similarities(rows, columns, row_places, column_places)
        temperatures = self._temperature(listed_similarities(row_keys, column_keys, row_places, column_places))
        positive_temperatures = self._temperature((row_keys * self._network(partners, step)).sum(1))
        count = counted.sum(1).clamp(min=1)
        pushed = line_sums(negatives / temperatures, row_places, len(rows)) / count
        released = line_sums(temperatures.log() + 1 / temperatures, row_places, len(rows))
        held = rows.shape[1] / 2 * positive_temperatures.log() + 1 / positive_temperatures
        return pushed - (rows * partners).sum(1) / positive_temperatures + self.beta * (held - released)

    def _network(self, rows: Tensor, step: PairStep) -> Float[Tensor, "rows width"]:
        weights = {name: value.to(rows.dtype) for name, value in step.parameters.items()}
        inner = linear(rows, weights["inner_weight"], weights["inner_bias"]).relu()
        return linear(inner, weights["outer_weight"], weights["outer_bias"])

    def _temperature(self, agreement: Tensor) -> Tensor:
        return self.temperature_min + (self.temperature_max - self.temperature_min) * (-agreement).sigmoid()
