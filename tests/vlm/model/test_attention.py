"""Blocks that remember keys: what they make of tokens piece by piece, and of several sequences of one memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlm.attention_choice import AttentionChoice, AttentionShape, MeasuredAttention
from vlm.errors import EveryRankError
from vlm.model import attention
from vlm.model.attention import Attention, Block, LayerCache, _attend_in_steps, choose_attention

WIDTH, HEADS, LENGTH = 12, 3, 7
SHAPE = AttentionShape(device="cpu", dtype="float64", heads=HEADS, head_dim=WIDTH // HEADS, is_causal=True)


def block_of(*, is_cross: bool) -> Block:
    torch.manual_seed(0)
    block = Block(WIDTH, HEADS, 2.0, is_cross=is_cross, layer_scale=0.3).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("pieces", [[7], [1] * 7, [3, 4], [1, 2, 4], [4, 1, 2]])
@torch.no_grad()
def test_tokens_piece_by_piece_are_the_whole(pieces: list[int]) -> None:
    block, x = block_of(is_cross=False), torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    cache = LayerCache()
    found = torch.cat([block(piece, causal=True, cache=cache) for piece in x.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, block(x, causal=True), rtol=1e-12, atol=1e-12)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    torch.testing.assert_close(found, block(x, mask=mask), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_rows_that_are_taken_go_on_as_their_sequences() -> None:
    block, x = block_of(is_cross=False), torch.randn(3, LENGTH, WIDTH, dtype=torch.float64)
    cache = LayerCache()
    block(x[:, :4], causal=True, cache=cache)
    rows = torch.tensor([2, 0, 2])
    cache.take(rows)
    found = block(x[rows, 4:], causal=True, cache=cache)
    torch.testing.assert_close(found, block(x, causal=True)[rows, 4:], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_more_tokens_than_there_was_room_for_are_the_whole_too() -> None:
    block, x = block_of(is_cross=False), torch.randn(3, 90, WIDTH, dtype=torch.float64)
    cache, rows, found = LayerCache(), torch.tensor([1, 0, 2]), []
    for number, piece in enumerate(x.split([30, 1, 1, 1, 40, 1, 16], dim=1)):
        swapped = number % 2 == 1  # rows change places each time, and the sequences with them
        found.append(block(piece[rows] if swapped else piece, causal=True, cache=cache)[rows if swapped else slice(3)])
        cache.take(rows)
    torch.testing.assert_close(torch.cat(found, 1), block(x, causal=True), rtol=1e-12, atol=1e-12)
    assert cache.length == 90


@torch.no_grad()
def test_several_sequences_of_one_memory_are_each_its_own() -> None:
    block, memory = block_of(is_cross=True), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    x = torch.randn(6, 4, WIDTH, dtype=torch.float64)  # three of each memory
    cache = LayerCache()
    expected = torch.cat([block(x[n : n + 1], memory[n // 3 : n // 3 + 1]) for n in range(6)])
    torch.testing.assert_close(block(x, memory, cache=cache), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(x, None, cache=cache), expected, rtol=1e-12, atol=1e-12)
    del block.ln_1_kv  # nothing of the memory is computed again
    torch.testing.assert_close(block(x, memory, cache=cache), expected, rtol=1e-12, atol=1e-12)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a width of 12 does not divide into 5 heads"):
        Attention(WIDTH, 5)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "shown": {"mask": torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]]).bool()},
    "added": {"mask": torch.tensor([[0.0, -1, 2], [1, 0, -torch.inf], [3, 0, 0], [0, 0, 0.5]], dtype=torch.float64)},
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_in_steps_is_torchs_with_its_gradient(name: str) -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 4, 5), (2, 3, 3, 5), (2, 3, 3, 5)]
    rows = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    options = {{"mask": "attn_mask"}.get(key, key): value for key, value in MASKS[name].items()}
    weights = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    queries, keys, values = rows
    expected = scaled_dot_product_attention(queries, keys, values, **options)
    found = _attend_in_steps(queries, keys, values, **MASKS[name])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(made, rows, weights) for made in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_block_under_bf16_has_the_gradient_of_fp32() -> None:
    torch.manual_seed(0)
    block, x = Block(16, 2, 2.0), torch.randn(3, 6, 16)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    precise = torch.autograd.grad(block(x, causal=True).sum(), list(block.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        made: Tensor = block(x, causal=True)
    found = torch.autograd.grad(made.float().sum(), list(block.parameters()))
    for one, other in zip(found, precise, strict=True):
        assert float((one - other).norm()) <= 0.03 * float(other.norm()) + 1e-3


@pytest.mark.parametrize(
    ("choice", "length", "in_training", "in_evaluation"),
    [
        ("fused", 3, "fused", "fused"),
        ("explicit", 9, "explicit", "explicit"),
        ("auto", 3, "explicit", "fused"),  # up to 4 tokens it was measured to be the faster, with its gradient
        ("auto", 5, "fused", "fused"),
        ("auto", 9, "fused", "fused"),  # longer than anything that was measured
    ],
)
def test_whichever_way_is_chosen_attention_and_its_gradient_are_the_same(
    choice: AttentionChoice, length: int, in_training: str, in_evaluation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = block_of(is_cross=False), torch.randn(2, length, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(block(x, causal=True).square().sum(), x)[0]
    used: list[str] = []

    def watched(name: str, way: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(*given: Any, **named: Any) -> Tensor:
            used.append(name)
            return way(*given, **named)

        return attend

    monkeypatch.setattr(attention, "WAYS", {name: watched(name, way) for name, way in attention.WAYS.items()})
    choose_attention(block, choice)
    block.attn.measured = MeasuredAttention(shape=SHAPE, ways=((4, "explicit"), (8, "fused")))
    found = torch.autograd.grad(block(x, causal=True).square().sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    block.eval()(x.detach(), causal=True)
    assert used == [in_training, in_evaluation]


def test_rows_embedded_without_a_gradient_first_are_those_that_have_one_then() -> None:
    """As micro-batches are: the gradient that the loss sends back belongs to the embeddings that it saw."""
    block, x = block_of(is_cross=False).float().train(), torch.randn(5, 33, WIDTH)
    block.attn.measured = MeasuredAttention(shape=SHAPE, ways=((64, "explicit"),))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            first = block(x, causal=True)
        assert torch.equal(block(x, causal=True), first)


def test_a_choice_that_changes_nothing_is_refused() -> None:
    choose_attention(torch.nn.Linear(2, 2), "auto")
    with pytest.raises(EveryRankError, match="attention: explicit: no block of this model takes it"):
        choose_attention(torch.nn.Linear(2, 2), "explicit")
