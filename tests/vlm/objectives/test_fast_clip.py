"""FastCLIP v0 to v3: value and gradients, the temperature's too, are those of loops over pairs and samples."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vlm.objectives.global_contrast import ByHand, expected
from tests.vlm.objectives.parity import N, Setting, Whole, assert_same, defined, on_ranks
from vlm.distributed.world import World
from vlm.objectives.state import RunFacts
from vlm.objectives.terms.fast_clip import FastClip

# 7 steps of 5 an epoch, two epochs of decay: gamma is 1, then half way from 1 to 0.2.
SCHEDULE: dict[str, Any] = {"gamma_decay_epochs": 2}
GAMMAS = (1.0,) * 5 + (0.6,) * 5
VERSIONS = {
    "v0": ByHand("none", GAMMAS),
    "v1": ByHand("constant", GAMMAS, temperature=0.07),
    "v2": ByHand("own", GAMMAS, rho=7.0, temperature=0.03, bounds=(0.01, 1.0)),
    "v3": ByHand("model", GAMMAS, rho=6.5),
}


def setting(version: str, num_steps: int, **options: Any) -> Setting:
    schedule = {} if options.get("gamma_schedule") == "constant" else SCHEDULE
    return Setting({"fast_clip": {"version": version, **schedule, **options}}, num_steps=num_steps)


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_equals_the_double_loop_into_its_second_epoch(version: str) -> None:
    chosen = setting(version, 7)
    assert_same(on_ranks(chosen, 1), expected(chosen, VERSIONS[version]), tolerance=1e-9)


@pytest.mark.parametrize("version", ["v0", "v3"])
def test_uneven_ranks_share_samples_and_the_temperatures_gradient(version: str) -> None:
    chosen = replace(setting(version, 3, gamma_schedule="constant"), ids=(7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3))
    by_hand = replace(VERSIONS[version], gammas=(0.2,) * 3)
    assert_same(on_ranks(chosen, 3), expected(chosen, by_hand), tolerance=1e-9)


def test_a_whole_average_and_no_eps_make_v0_the_loss_over_the_batch() -> None:
    """gamma 1: log mean_j exp(a h_ij), differentiated as it stands, the scale's gradient included."""

    def batch_loss(batch: Whole) -> Tensor:
        similarity = batch.scale * (batch.image @ batch.text.T)
        total = torch.zeros((), dtype=torch.float64)
        for logits in (similarity, similarity.T):
            contrast = (logits - logits.diagonal()[:, None])[~torch.eye(N, dtype=torch.bool)].view(N, N - 1)
            total = total + (contrast.logsumexp(1) - math.log(N - 1)).sum()
        return total / (2 * N) + 0 * batch.bias.sum()

    chosen = setting("v0", 2, gamma=1.0, eps=0.0)
    assert_same(on_ranks(chosen, 1), defined(chosen, batch_loss, step=1))


def test_gamma_follows_the_papers_cosine_by_whole_epochs() -> None:
    """gamma_t = (1 + cos(pi floor(t / E') / E)) (1 - gamma_min) / 2 + gamma_min, gamma_min from epoch E on."""
    facts = RunFacts(2, 0, num_steps=60, steps_per_epoch=10, seed=0, world=World())  # 6 epochs: E = 3
    found = [FastClip().gamma_at(step, facts) for step in (0, 9, 10, 29, 30, 59)]
    assert found == pytest.approx([1.0, 1.0, 0.8, 0.4, 0.2, 0.2])


def test_each_version_has_its_papers_rho_unless_told() -> None:
    assert [FastClip(version=version).rho for version in ("v2", "v3")] == [7.0, 6.5]
    assert FastClip(version="v2", rho=3.0).rho == 3.0
    written = FastClip(version="v2", rho=3.0).model_dump(mode="json")
    assert FastClip.model_validate(written) == FastClip(version="v2", rho=3.0)
