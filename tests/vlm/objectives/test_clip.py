"""The gathered CLIP loss: values and gradients of one process on the whole batch, in float64, at any world size."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_ranks
from vlm.objectives.clip import clip_loss
from vlm.world import World

N, D = 12, 5


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image, text = (torch.randn(N, D, dtype=torch.float64, generator=generator) for _ in range(2))
    return image, text, torch.tensor([1 / 0.07], dtype=torch.float64)


def brute_force(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The definition, pair by pair."""
    image = image / image.norm(dim=1, keepdim=True)
    text = text / text.norm(dim=1, keepdim=True)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(image)):
        to_texts = torch.stack([torch.exp(scale[0] * image[i] @ text[j]) for j in range(len(text))])
        to_images = torch.stack([torch.exp(scale[0] * text[i] @ image[j]) for j in range(len(text))])
        total = total - torch.log(to_texts[i] / to_texts.sum()) - torch.log(to_images[i] / to_images.sum())
    return total / (2 * len(image))


def gradients(image: Tensor, text: Tensor, scale: Tensor, loss_of: object) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
    value = loss_of(*leaves)  # type: ignore[operator]
    value.backward()
    return value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


def on_this_rank() -> tuple[Tensor, ...]:
    """The value, and the gradients of a model whose weights are the raw rows: what DDP's averaging would leave."""
    world = World.current()
    rows = slice(world.rank * N // world.size, (world.rank + 1) * N // world.size)

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        x, y = image[rows], text[rows]
        return clip_loss(x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True), scale, world)

    averaged = []
    for tensor in gradients(*inputs(), loss):
        if world.size > 1:
            dist.all_reduce(tensor)
        averaged.append(tensor / world.size)
    return tuple(averaged)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_value_and_averaged_gradients_equal_one_process_on_the_whole_batch(world_size: int) -> None:
    expected = gradients(*inputs(), brute_force)
    results = [on_this_rank()] if world_size == 1 else run_ranks(on_this_rank, world_size)
    for result in results:
        for found, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_loss_of_identical_embeddings_is_the_log_of_the_batch() -> None:
    rows = torch.zeros(7, 4, dtype=torch.float64)
    rows[:, 0] = 1
    assert clip_loss(rows, rows, torch.tensor([20.0], dtype=torch.float64), World()).item() == pytest.approx(
        math.log(7)
    )
