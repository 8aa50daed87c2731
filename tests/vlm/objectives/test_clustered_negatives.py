"""Clustered and weighted negatives: each form's definition at any world size, and where it meets a plain loss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.vlm.objectives.parity import D, Setting, Whole, assert_defined_by, on_ranks
from tests.vlm.objectives.test_clip import cross_entropy
from vlm.distributed.world import World
from vlm.objectives.counter_rng import uniforms
from vlm.objectives.state import RunFacts
from vlm.objectives.terms.clustered_negatives import ClusteredNegatives

REPEATED = (7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3)


def setting_of(**options: Any) -> Setting:
    return Setting({"clustered_negatives": options})


def labels_of(rows: Tensor, ids: Tensor, number: int, count: int, iterations: int = 5) -> list[int]:
    """The cluster of each row at seed 0, step 0: k-means as a loop."""
    rows = rows.detach()
    if count >= len(rows):
        return list(range(len(rows)))
    keys = uniforms(0, 0, ids, f"clusters {number}", 1)[:, 0]
    centres = rows[sorted(range(len(rows)), key=lambda i: keys[i].item())[:count]]
    for _ in range(iterations):
        labels = (rows @ centres.T).argmax(1)
        means = [rows[labels == c].sum(0) if (labels == c).any() else centres[c] for c in range(count)]
        centres = torch.stack([mean / mean.norm() for mean in means])
    found: list[int] = (rows @ centres.T).argmax(1).tolist()
    return found


def meta_nodes(whole: Whole, clusters: int, nearest: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    count = len(whole.image)
    for rows, columns in ((whole.image, whole.text), (whole.text, whole.image)):
        labels = labels_of(columns, whole.ids, 0, clusters)
        for i in range(count):
            logits = {j: whole.scale[0] * rows[i] @ columns[j] for j in range(count) if whole.ids[j] != whole.ids[i]}
            order = sorted(logits, key=lambda j: -logits[j].item())
            positive = whole.scale[0] * rows[i] @ columns[i]
            parts = [positive.exp(), *(logits[j].exp() for j in order[:nearest])]
            for cluster in range(clusters):
                left = [logits[j] for j in order[nearest:] if labels[j] == cluster]
                if left:
                    parts.append(len(left) * torch.stack(left).mean().exp())
            total = total + torch.stack(parts).sum().log() - positive
    return total / (2 * count)


def cluster_weights(whole: Whole, clusters: tuple[int, ...]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    count = len(whole.image)
    for rows, columns in ((whole.image, whole.text), (whole.text, whole.image)):
        labels = [labels_of(columns, whole.ids, number, some) for number, some in enumerate(clusters)]
        for i in range(count):
            weights = [sum(some[i] != some[j] for some in labels) for j in range(count)]
            kept = [j for j in range(count) if weights[j] and whole.ids[j] != whole.ids[i]]
            if kept:
                parts = [weights[j] * (whole.scale[0] * rows[i] @ columns[j]).exp() for j in kept]
                total = total + torch.stack(parts).sum().log() - whole.scale[0] * rows[i] @ columns[i]
    return total / (2 * count)


def learned_weights(whole: Whole, network: dict[str, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    count = len(whole.image)
    for rows, columns in ((whole.image, whole.text), (whole.text, whole.image)):
        for i in range(count):
            others = [j for j in range(count) if whole.ids[j] != whole.ids[i]]
            hidden = [torch.tanh(network["hidden"] @ (rows[i] + columns[j]) + network["hidden_bias"]) for j in others]
            raw = torch.cat([torch.sigmoid(one @ network["output"] + network["output_bias"]) for one in hidden])
            weights = raw * len(others) / raw.sum()
            positive = whole.scale[0] * rows[i] @ columns[i]
            logits = torch.stack([whole.scale[0] * rows[i] @ columns[j] for j in others])
            total = total + (positive.exp() + weights @ logits.exp()).log() - positive
    return total / (2 * count)


@pytest.mark.parametrize(("clusters", "nearest"), [(3, 0), (4, 2)])
def test_meta_nodes_stand_for_the_far_negatives_of_all_ranks(clusters: int, nearest: int) -> None:
    setting = replace(setting_of(clusters=(clusters,), nearest=nearest), ids=REPEATED)
    assert_defined_by(setting, lambda whole: meta_nodes(whole, clusters, nearest))


@pytest.mark.parametrize("options", [{"clusters": (11,), "nearest": 0}, {"clusters": (1,), "nearest": 11}])
def test_meta_nodes_of_one_column_or_none_are_the_plain_loss(options: dict[str, Any]) -> None:
    assert_defined_by(setting_of(**options), cross_entropy, (1,))


@pytest.mark.parametrize("clusters", [(3,), (2, 3, 5)])
def test_negatives_weigh_as_many_clusterings_as_hold_them_apart(clusters: tuple[int, ...]) -> None:
    setting = replace(setting_of(form="cluster_weights", clusters=clusters), ids=REPEATED)
    assert_defined_by(setting, lambda whole: cluster_weights(whole, clusters))


def test_one_clustering_into_single_rows_is_the_decoupled_loss() -> None:
    def decoupled(whole: Whole) -> Tensor:
        logits = whole.scale * whole.image @ whole.text.T
        negatives = logits.masked_fill(torch.eye(11, dtype=torch.bool), float("-inf"))
        return (negatives.logsumexp(1) + negatives.logsumexp(0) - 2 * logits.diagonal()).mean() / 2

    assert_defined_by(setting_of(form="cluster_weights", clusters=(11,)), decoupled, (1,))


def test_all_in_one_cluster_is_no_loss_and_no_gradient() -> None:
    for world_size in (1, 3):
        found = on_ranks(setting_of(form="cluster_weights", clusters=(1,)), world_size)
        assert not any(tensor.any() for tensor in found.values())


def first_network() -> dict[str, Tensor]:
    facts = RunFacts(dim=D, num_samples=40, num_steps=10, steps_per_epoch=5, seed=0, world=World())
    return ClusteredNegatives(form="learned_weights", hidden=3).parameters(facts)


def test_learned_weights_and_their_network_train_alike_at_any_world_size() -> None:
    setting = replace(setting_of(form="learned_weights", hidden=3), ids=REPEATED)
    network = {name: value.double().requires_grad_() for name, value in first_network().items()}
    assert_defined_by(setting, lambda whole: learned_weights(whole, network))
    gradients = {name: value.grad for name, value in network.items()}
    for world_size in (1, 3):
        found = on_ranks(setting, world_size)
        for name, gradient in gradients.items():
            assert gradient is not None
            assert gradient.abs().max() > 1e-6
            torch.testing.assert_close(found[f"clustered_negatives/{name}"], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clusters": (3, 5)}, r"clusters: found .* takes .*above 0"),
        ({"clusters": (0,), "form": "cluster_weights"}, r"clusters\.0\n +Input should be greater than 0"),
    ],
)
def test_a_number_of_clusters_that_a_form_cannot_use_is_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ClusteredNegatives(**options)
