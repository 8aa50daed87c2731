"""Negatives by cluster: far ones stood for by their cluster's mean, or those of the own cluster weighing less."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.counter_rng import uniforms
from vlm.objectives.registry import TERMS
from vlm.objectives.state import RunFacts
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm
from vlm.objectives.terms.clusters import ClustersApart, spherical_k_means
from vlm.objectives.terms.learned_weights import PairNetwork, learned_log_sum_exp
from vlm.objectives.terms.meta_nodes import meta_node_log_sum_exp
from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.log_sum_exp import log_sum_exp


@TERMS.register("clustered_negatives")
class ClusteredNegatives(PairTerm):
    """The contrastive loss with another sum over negatives; s_ij = a <x_i, y_j>, both directions, mean over pairs.

    Columns are clustered by a few iterations of spherical k-means, anew in each step (texts for the sums of images,
    images for those of texts), the first centres being drawn by seed, step and sample id. No gradient goes through it.

    - `meta_nodes`: -log( e^{s_ii} / (e^{s_ii} + sum_{j near} e^{s_ij} + sum_c n_c e^{a <x_i, c>}) ): the `nearest`
      negatives are exact, of the others each cluster's n_c are stood for by their mean c (after PamC, Kulatilleke et
      al., 2022, which has no exact ones and sums over pairs of clusters). At most the plain loss, and equal to it with
      as many clusters as pairs.
    - `cluster_weights`: -log( e^{s_ii} / sum_j g_ij e^{s_ij} ) with g_ij = R less the number of the R clusterings, one
      for each number of `clusters`, in which i and j share a cluster; the pair itself has g_ii = 0 (MEOW, Yu et al.,
      2023, without its prototypes). A pair all of whose negatives weigh 0 has no loss.
    - `learned_weights`: -log( e^{s_ii} / (e^{s_ii} + sum_{j != i} g_ij e^{s_ij}) ) with g_ij ~ sigmoid(MLP(x_i + y_j)),
      learned with the model (AdaMEOW, Yu et al., 2023). There the MLP could make all weights 0; here a row's weights
      have a mean of 1, and the positive weighs 1.
    """

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
        "clusters": ("form", ("meta_nodes", "cluster_weights")),
        "iterations": ("form", ("meta_nodes", "cluster_weights")),
        "nearest": ("form", ("meta_nodes",)),
        "hidden": ("form", ("learned_weights",)),
    }

    form: Literal["meta_nodes", "cluster_weights", "learned_weights"] = Field(
        default="meta_nodes", description="how negatives are summed"
    )
    clusters: tuple[Annotated[int, Field(gt=0, le=2**20)], ...] = Field(
        default=(64,), min_length=1, description="numbers of clusters; meta_nodes: one, cluster_weights: R of them"
    )
    iterations: int = Field(default=5, ge=0, le=1000, description="of k-means in each step")
    nearest: int = Field(default=16, ge=0, le=2**24, description="meta_nodes: negatives a row that are exact")
    hidden: int = Field(default=16, gt=0, le=65536, description="learned_weights: hidden units of the MLP")

    @model_validator(mode="after")
    def _check_clusters(self) -> "ClusteredNegatives":
        if min(self.clusters) < 1 or (self.form == "meta_nodes" and len(self.clusters) > 1):
            wanted = "one number above 0" if self.form == "meta_nodes" else "numbers above 0"
            raise ValueError(f"clusters: found {list(self.clusters)}; {self.form} takes {wanted}")
        return self

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between))

    def parameters(self, facts: RunFacts) -> dict[str, Tensor]:  # noqa: D102
        if self.form != "learned_weights":
            return {}
        generator = torch.Generator().manual_seed(facts.seed)

        def drawn(*shape: int, inputs: int) -> Tensor:
            return (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(max(inputs, 1))

        return {
            "hidden": drawn(self.hidden, facts.dim, inputs=facts.dim),
            "hidden_bias": drawn(self.hidden, inputs=facts.dim),
            "output": drawn(self.hidden, inputs=self.hidden),
            "output_bias": drawn(1, inputs=self.hidden),
        }

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        pairs = step.pairs
        positive = step.logit_scale * pairs.positive_similarity()
        if self.form == "cluster_weights":
            losses = [torch.where(lse.isneginf(), 0.0, lse - positive) for lse in self._cluster_weights(step)]
        else:
            sums = self._meta_nodes if self.form == "meta_nodes" else self._learned_weights
            negatives = sums(step, pairs.x, pairs.all_y), sums(step, pairs.y, pairs.all_x)
            losses = [-logsigmoid(positive - lse) for lse in negatives]
        return pairs.mean((losses[0] + losses[1]) / 2)

    def _meta_nodes(self, step: PairStep, rows: Tensor, columns: Tensor) -> Float[Tensor, " rows"]:
        (excluded,) = step.pairs.other_samples
        assert isinstance(excluded, EqualKeys)
        labels = self._labels(step, columns)[:, 0]
        return meta_node_log_sum_exp(rows, columns, labels, step.logit_scale, excluded, self.nearest)

    def _cluster_weights(self, step: PairStep) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        pairs = step.pairs
        y_labels, x_labels = self._labels(step, pairs.all_y), self._labels(step, pairs.all_x)
        local, others = pairs.ranks.local, pairs.other_samples
        x_lse, column_lse = log_sum_exp(
            pairs.x,
            pairs.y_columns,
            step.logit_scale,
            (*others, ClustersApart(y_labels[local], y_labels)),
            (*others, ClustersApart(x_labels[local], x_labels)),
            matmul_dtype=pairs.matmul_dtype,
        )
        return x_lse, pairs.ranks.merge_log_sum_exp(column_lse)

    def _learned_weights(self, step: PairStep, rows: Tensor, columns: Tensor) -> Float[Tensor, " rows"]:
        network = PairNetwork(**step.parameters)
        return learned_log_sum_exp(rows, columns, step.logit_scale, network, step.pairs.other_samples)

    def _labels(self, step: PairStep, columns: Tensor) -> Int64[Tensor, "all R"]:
        """Each column's cluster in each of the clusterings."""
        pairs, labels = step.pairs, []
        for number, count in enumerate(self.clusters):
            keys = uniforms(step.seed, step.step, pairs.all_ids, f"clusters {number}", 1)[:, 0]
            labels.append(spherical_k_means(columns.detach(), pairs.ranks, keys, count, self.iterations))
        return torch.stack(labels, 1)
