"""Sums with learned weights: a float64 double loop's values and gradients, and no way to make all weights small."""

import pytest
import torch
from torch import Tensor

from vlm.objectives.terms import learned_weights
from vlm.objectives.terms.learned_weights import PairNetwork, learned_log_sum_exp
from vlm.similarity.entry_weights import EqualKeys

SCALE = torch.tensor([6.0], dtype=torch.float64, requires_grad=True)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def written_out(x: Tensor, y: Tensor, network: PairNetwork, keys: Tensor) -> Tensor:
    results = []
    for i in range(len(x)):
        others = [j for j in range(len(y)) if keys[j] != keys[i]]
        hidden = [torch.tanh(network.hidden @ (x[i] + y[j]) + network.hidden_bias) for j in others]
        raw = [torch.sigmoid((network.output * one).sum() + network.output_bias[0]) for one in hidden]
        total = sum(raw, start=torch.zeros(()))
        terms = [g / total * len(others) * (SCALE[0] * (x[i] @ y[j])).exp() for g, j in zip(raw, others, strict=True)]
        results.append(torch.stack(terms).sum().log() if terms else torch.tensor(float("-inf"), dtype=torch.float64))
    return torch.stack(results)


@pytest.mark.parametrize("activations", [1, 100, 2**24])
def test_sums_and_gradients_equal_a_double_loop(monkeypatch: pytest.MonkeyPatch, activations: int) -> None:
    monkeypatch.setattr(learned_weights, "_BLOCK_ACTIVATIONS", activations)
    x, y = drawn(9, 5, seed=0), drawn(9, 5, seed=1)
    network = PairNetwork(drawn(3, 5, seed=2), drawn(3, seed=3), drawn(3, seed=4), drawn(1, seed=5))
    keys = torch.tensor([0, 1, 2, 3, 0, 5, 1, 7, 8])
    factors = torch.linspace(-1, 2, 9, dtype=torch.float64)
    results = []
    for logs in (
        learned_log_sum_exp(x, y, SCALE, network, (EqualKeys(keys, keys),)),
        written_out(x, y, network, keys),
    ):
        results.append((logs, *torch.autograd.grad((logs * factors).sum(), (x, y, SCALE, *network))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_row_without_entries_sums_to_nothing_and_passes_no_gradient() -> None:
    x, y = drawn(4, 5, seed=0), drawn(4, 5, seed=1)
    network = PairNetwork(drawn(3, 5, seed=2), drawn(3, seed=3), drawn(3, seed=4), drawn(1, seed=5))
    keys = torch.tensor([0, 0, 0, 0])
    logs = learned_log_sum_exp(x, y, SCALE, network, (EqualKeys(keys, keys),))
    assert logs.isneginf().all()
    gradients = torch.autograd.grad(torch.where(logs.isneginf(), 0.0, logs).sum(), (x, y, *network))
    assert not any(gradient.any() for gradient in gradients)


def test_equal_weights_are_no_weights_however_small_they_are() -> None:
    x, y = drawn(9, 5, seed=0), drawn(9, 5, seed=1)
    hidden = torch.zeros(3, 5, dtype=torch.float64)
    network = PairNetwork(hidden, hidden[:, 0], hidden[:, 0], torch.tensor([-40.0], dtype=torch.float64))
    keys = torch.arange(9)
    plain = (SCALE * (x @ y.T)).masked_fill(torch.eye(9, dtype=torch.bool), float("-inf")).logsumexp(1)
    torch.testing.assert_close(learned_log_sum_exp(x, y, SCALE, network, (EqualKeys(keys, keys),)), plain)
