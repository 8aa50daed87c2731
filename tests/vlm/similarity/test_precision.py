"""How far fp32 and bf16 are from float64, beside a dense loss of the same precision."""

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from tests.vlm.objectives.batches import batch_of, outputs_of
from vlm.distributed.world import World
from vlm.objectives.step import pair_step
from vlm.objectives.terms.clip import Clip
from vlm.similarity.config import SimilarityConfig
from vlm.similarity.exchange import Exchange

N, D = 768, 256
PARTS = ("value", "image", "text", "scale")

Outcome = dict[str, Tensor]


def features(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows in fp32: random; pairs at a cosine near 1; or nearly the same row everywhere."""
    generator = torch.Generator().manual_seed(seed)
    image, text, one = (torch.randn(size, D, generator=generator) for size in (N, N, 1))
    if kind == "aligned":
        text = image + 0.05 * text
    if kind == "near duplicates":
        image, text = one + 0.01 * image, one + 0.01 * text
    return normalize(image, dim=1), normalize(text, dim=1)


def ours(image: Tensor, text: Tensor, scale: Tensor, product: str) -> Tensor:
    batch = batch_of(len(image))
    exchange = Exchange(World(), SimilarityConfig.model_validate({"product": product}))
    return Clip()(pair_step(outputs_of(image, text, scale), batch, exchange))


def dense(image: Tensor, text: Tensor, scale: Tensor, product: str) -> Tensor:
    """open_clip's formula."""
    labels = torch.arange(len(image))
    with torch.autocast("cpu", torch.bfloat16, enabled=product == "bf16"):
        per_image, per_text = scale * image @ text.T, scale * text @ image.T
        return (cross_entropy(per_image, labels) + cross_entropy(per_text, labels)) / 2


def exact(image: Tensor, text: Tensor, scale: Tensor, product: str) -> Tensor:
    """The same in float64, with the positive kept out of the sum that it is compared with: nothing is lost to 1 - 1."""
    logits = scale * image @ text.T
    positive = logits.diagonal()
    others = logits.masked_fill(torch.eye(len(image), dtype=torch.bool), float("-inf"))
    return -(logsigmoid(positive - others.logsumexp(1)) + logsigmoid(positive - others.logsumexp(0))).mean() / 2


LOSSES = {"ours": ours, "dense": dense, "exact": exact}


@cache
def outcome(loss: str, kind: str, seed: int, scale: float, product: str) -> Outcome:
    """Value and gradients."""
    dtype = torch.float64 if product == "fp64" else torch.float32
    image, text, logit_scale = (
        part.to(dtype).requires_grad_() for part in (*features(kind, seed), torch.tensor([scale]))
    )
    value = LOSSES[loss](image, text, logit_scale, product)
    gradients = torch.autograd.grad(value, (image, text, logit_scale))
    return dict(zip(PARTS, (value.detach(), *gradients), strict=True))


def errors(loss: str, kind: str, scale: float, product: str, seed: int) -> dict[str, float]:
    """Relative to float64 at the same fp32 numbers: norm of the difference over norm."""
    wanted, found = outcome("exact", kind, seed, scale, "fp64"), outcome(loss, kind, seed, scale, product)
    return {part: float((found[part].double() - wanted[part]).norm() / wanted[part].norm()) for part in PARTS}


SEEDS = range(4)


def worst(loss: str, kind: str, scale: float, product: str) -> dict[str, float]:
    """The largest errors over some draws: one draw's may be small by luck."""
    by_seed = [errors(loss, kind, scale, product, seed) for seed in SEEDS]
    return {part: max(some[part] for some in by_seed) for part in PARTS}


def test_random_features_at_the_usual_scale() -> None:
    for part, error in worst("ours", "random", 14.3, "fp32").items():
        assert error <= 2e-6, part


CASES = [("random", 14.3), ("random", 100.0), ("aligned", 14.3), ("aligned", 100.0)]
ROUNDING = 2.4e-7  # two units in the last place of fp32: a result's own rounding


@pytest.mark.parametrize(("kind", "scale"), [*CASES, ("near duplicates", 100.0)])
def test_fp32_is_as_near_as_a_dense_fp32_loss(kind: str, scale: float) -> None:
    """Within half as much again."""
    found, theirs = worst("ours", kind, scale, "fp32"), worst("dense", kind, scale, "fp32")
    if kind == "near duplicates":  # the scale's gradient is a difference of two means of cosines near 1, both rounded
        del found["scale"]
    for part in found:
        assert found[part] <= max(1.5 * theirs[part], ROUNDING), part


@pytest.mark.parametrize(("kind", "scale"), CASES)
def test_bf16_products_are_as_near_as_a_dense_bf16_loss(kind: str, scale: float) -> None:
    """Where cosines differ by less than bf16 can say, as between near duplicates, neither gradient means anything."""
    found, theirs = worst("ours", kind, scale, "bf16"), worst("dense", kind, scale, "bf16")
    for part in PARTS:
        assert found[part] <= 1.05 * theirs[part], part


@pytest.mark.parametrize("product", ["fp32", "bf16"])
def test_near_duplicates_at_the_largest_scale_are_finite(product: str) -> None:
    for part, tensor in outcome("ours", "near duplicates", 0, 100.0, product).items():
        assert tensor.isfinite().all(), part
