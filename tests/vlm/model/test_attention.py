"""Blocks that remember keys: what they make of tokens piece by piece, and of several sequences of one memory."""

import pytest
import torch

from vlm.model.attention import Attention, Block, LayerCache

WIDTH, HEADS, LENGTH = 12, 3, 7


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
def test_several_sequences_of_one_memory_are_each_its_own() -> None:
    block, memory = block_of(is_cross=True), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    x = torch.randn(6, 4, WIDTH, dtype=torch.float64)  # three of each memory
    cache = LayerCache()
    expected = torch.cat([block(x[n : n + 1], memory[n // 3 : n // 3 + 1]) for n in range(6)])
    torch.testing.assert_close(block(x, memory, cache=cache), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(x, None, cache=cache), expected, rtol=1e-12, atol=1e-12)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a width of 12 does not divide into 5 heads"):
        Attention(WIDTH, 5)
