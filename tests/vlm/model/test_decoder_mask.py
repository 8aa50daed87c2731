"""Which image tokens each token of a text may look at: a loop over queries, texts that see nothing, no texts at all."""

import math

import pytest
import torch
from torch import Tensor

from vlm.model.attention import Attention
from vlm.model.captioner import CaptionDecoder, NextToken
from vlm.model.captioner_config import CaptionerConfig

WIDTH, HEADS, TEXTS, LENGTH, TOKENS = 8, 2, 4, 5, 6


def decoder(layers: int = 2) -> CaptionDecoder:
    torch.manual_seed(0)
    config = CaptionerConfig(layers=layers, heads=HEADS, width=WIDTH, queries=2, pooler_heads=2)
    made = CaptionDecoder(config, WIDTH, WIDTH, 30).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_mask() -> Tensor:
    mask = drawn(TEXTS, LENGTH, TOKENS, seed=2) > 0.3
    mask[0, :2] = False
    return mask


@pytest.mark.parametrize("texts_an_image", [1, 2])
@torch.no_grad()
def test_a_query_weighs_what_it_may_look_at_and_nothing_else(texts_an_image: int) -> None:
    torch.manual_seed(0)
    attention = Attention(WIDTH, HEADS).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x, memory, mask = drawn(TEXTS, LENGTH, WIDTH), drawn(TEXTS // texts_an_image, TOKENS, WIDTH, seed=3), some_mask()
    found = attention(x, memory, mask=mask, is_cross=True)
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    for text in range(TEXTS):
        keys, values = (memory[text // texts_an_image] @ weights[part].T + biases[part] for part in (1, 2))
        for place in range(LENGTH):
            shown = mask[text, place].nonzero()[:, 0].tolist()
            if not shown:
                assert not found[text, place].any()
                continue
            query = x[text, place] @ weights[0].T + biases[0]
            heads = []
            for head in torch.arange(WIDTH).chunk(HEADS):
                logits = torch.stack([query[head] @ keys[token, head] for token in shown]) / math.sqrt(WIDTH // HEADS)
                heads.append(torch.softmax(logits, 0) @ values[shown][:, head])
            torch.testing.assert_close(found[text, place], attention.out_proj(torch.cat(heads)))


def states_of(made: NextToken | Tensor) -> Tensor:
    assert isinstance(made, NextToken)
    return made.states


@torch.no_grad()
def test_a_mask_that_hides_nothing_is_none_and_what_it_hides_from_all_might_not_be_there() -> None:
    made, states, image = decoder(), drawn(TEXTS, LENGTH, WIDTH), drawn(TEXTS, TOKENS, WIDTH, seed=3)
    everything = torch.ones(TEXTS, LENGTH, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(states_of(made(states, image, mask=everything)), states_of(made(states, image)))
    everything[:, :, 2:4] = False
    expected = states_of(made(states, image[:, [0, 1, 4, 5]]))
    torch.testing.assert_close(states_of(made(states, image, mask=everything)), expected)


def test_a_text_that_may_look_nowhere_is_one_without_cross_attention_and_teaches_it_nothing() -> None:
    made, image = decoder(), drawn(TEXTS, TOKENS, WIDTH, seed=3).requires_grad_()
    states, mask = drawn(TEXTS, LENGTH, WIDTH), some_mask()
    mask[1] = False
    found = states_of(made(states, image, mask=mask))
    parameters = dict(made.named_parameters())
    of_attention = [name for name in parameters if name.startswith("cross_attn") and ".attn." in name]
    chosen = [parameters[name] for name in of_attention]
    gradients = torch.autograd.grad(found[1].sum(), [image, *chosen], retain_graph=True)
    assert not any(bool(gradient.any()) for gradient in gradients)
    for gradient in torch.autograd.grad(found.square().sum(), [image, *chosen]):
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())
    with torch.no_grad():
        for name in of_attention:
            if "out_proj" in name:
                parameters[name].zero_()
        assert torch.equal(states_of(made(states, image))[1], found[1])


@pytest.mark.parametrize("shown", ["masked", "whole"])
def test_no_texts_have_a_gradient_of_zero_at_every_parameter(shown: str) -> None:
    """A rank without documents still runs the decoder: engines wait for each gradient."""
    made = decoder()
    mask = torch.zeros(0, LENGTH, TOKENS, dtype=torch.bool) if shown == "masked" else None
    told = made(
        drawn(0, LENGTH, WIDTH),
        drawn(0, TOKENS, WIDTH),
        mask=mask,
        targets=torch.zeros(0, LENGTH, dtype=torch.long),
        num_targets=torch.zeros(0, dtype=torch.long),
    )
    assert isinstance(told, Tensor)
    assert told.shape == (0, 2)
    told.sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
