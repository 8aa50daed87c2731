"""The likelihoods of tokens in chunks: torch's own on all logits, whatever the chunks are."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from vlm.model import token_likelihood as module
from vlm.model.token_likelihood import token_likelihood

TOKENS, WIDTH, VOCABULARY = 7, 5, 11


def inputs(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (3 * torch.randn(WIDTH, VOCABULARY, generator=generator)).to(dtype).requires_grad_()
    return states, weight, torch.randint(0, VOCABULARY, (tokens,), generator=generator)


def definition(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_p = log_softmax(states @ weight, dim=1)
    return torch.stack([log_p[torch.arange(len(targets)), targets], log_p.mean(1)], dim=1)


@pytest.mark.parametrize("tokens_a_chunk", [1, 2, 3, 7, 8, 100])
def test_value_and_gradient_do_not_know_the_chunks(monkeypatch: pytest.MonkeyPatch, tokens_a_chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", tokens_a_chunk * VOCABULARY)
    states, weight, targets = inputs()
    factors = torch.randn(TOKENS, 2, dtype=torch.float64)
    found, expected = token_likelihood(states, weight, targets), definition(states, weight, targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad((found * factors).sum(), (states, weight)),
        torch.autograd.grad((expected * factors).sum(), (states, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(lambda rows, columns: token_likelihood(rows, columns, targets), (states, weight))


def test_what_is_locked_gets_no_gradient() -> None:
    states, weight, targets = inputs()
    token_likelihood(states, weight.detach(), targets).sum().backward()
    assert states.grad is not None
    states = states.detach()
    token_likelihood(states, weight, targets).sum().backward()
    assert weight.grad is not None


def test_no_tokens_have_no_likelihood() -> None:
    states, weight, targets = inputs(tokens=0)
    found = token_likelihood(states, weight, targets)
    assert found.shape == (0, 2)
    found.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("tokens_a_chunk", [2, 7])
def test_under_autocast_products_are_in_bf16_and_sums_in_fp32(
    monkeypatch: pytest.MonkeyPatch, tokens_a_chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", tokens_a_chunk * VOCABULARY)
    states, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_likelihood(states, weight, targets)
    assert found.dtype == torch.float32
    rounded = (states.detach().bfloat16() @ weight.detach().bfloat16()).double()
    expected = rounded.log_softmax(1)[torch.arange(TOKENS), targets]
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=0, atol=1e-5)
    ours = torch.autograd.grad(found.sum(), (states, weight))
    theirs = torch.autograd.grad(definition(states, weight, targets).sum(), (states, weight))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert torch.linalg.norm(one - other) <= 0.02 * torch.linalg.norm(other)


def test_logits_too_large_for_an_exponential_stay_finite() -> None:
    states, weight, targets = inputs(torch.float32)
    states = (1000 * states).detach().requires_grad_()
    found = token_likelihood(states, weight, targets)
    torch.testing.assert_close(found, definition(states, weight, targets), rtol=1e-5, atol=1e-3)
    (gradient,) = torch.autograd.grad(found.sum(), states)
    assert gradient.isfinite().all()
