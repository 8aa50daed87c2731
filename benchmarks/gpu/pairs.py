"""Comparison of pairs on the device beside float64: losses tile by tile, and the Triton kernels by themselves."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from benchmarks.gpu.setting import Line, Setting, full_precision, relative
from benchmarks.loss.ways import Leaves, Way, leaves, term
from vlm.distributed.world import World

_BIAS = -10.0
_SCALES = (14.3, 100.0)
_BOUNDS = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 3e-2)}  # of the value, of gradients


def check_tiles(setting: Setting) -> list[Line]:
    """Values and gradients of the losses: few pairs, which plain torch compares, and many, which kernels may."""
    world = World(device=setting.place)
    lines = []
    with full_precision():
        for name, dense in (("clip", _dense_clip), ("sigmoid", _dense_sigmoid)):
            for product, (of_value, of_gradients) in _BOUNDS.items():
                way = term({name: 1.0}, product)
                found = [
                    _errors(way, dense, leaves(pairs, scale, _BIAS, world, dim=setting.choose(512, 64)), world)
                    for pairs in (setting.choose(1000, 50), setting.choose(4096, 150))
                    for scale in _SCALES
                ]
                values, gradients = (max(part) for part in zip(*found, strict=True))
                lines += [
                    Line(f"{name} {product}, value", values, of_value),
                    Line(f"{name} {product}, gradients", gradients, of_gradients),
                ]
    return lines


def _errors(way: Way, dense: Way, rows: Leaves, world: World) -> tuple[float, float]:
    """Of the value, and the largest of the gradients'."""
    value = way(rows, world)
    value.backward()
    exact = {key: leaf.detach().double().requires_grad_() for key, leaf in rows.items()}
    wanted = dense(exact, world)
    wanted.backward()
    pairs = [(leaf.grad, exact[key].grad) for key, leaf in rows.items()]
    compared = [relative(one, other) for one, other in pairs if one is not None and other is not None]
    return relative(value, wanted), max(compared)


def _dense_clip(rows: Leaves, _: World) -> Tensor:
    logits = rows["scale"] * rows["image"] @ rows["text"].T
    own = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def _dense_sigmoid(rows: Leaves, _: World) -> Tensor:
    logits = rows["scale"] * rows["image"] @ rows["text"].T + rows["bias"]
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -logsigmoid(signs * logits).sum() / len(logits)


def check_kernels(setting: Setting) -> list[Line]:
    """Log-sum-exps and gradients by the Triton kernels, at ragged sizes, with and without entries that do not count."""
    from vlm.similarity.triton.launch import fused_log_sum_exp  # imports Triton, which may not be there

    x, y = _unit(setting.choose(1037, 37), setting), _unit(setting.choose(2053, 53), setting)
    keys = [torch.arange(len(some), device=setting.place) % 97 for some in (x, y)]
    lines = []
    with full_precision():
        for product, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            errors = [
                _kernel_errors(fused_log_sum_exp, scale * x, y, some_keys, dtype)
                for scale in _SCALES
                for some_keys in ((None, None), tuple(keys))
            ]
            of_value, of_gradients = _BOUNDS[product]
            lines += [
                Line(f"{product}, values", max(one for one, _ in errors), of_value),
                Line(f"{product}, gradients", max(other for _, other in errors), of_gradients),
            ]
    return lines


def _kernel_errors(
    reduction: object, x: Tensor, y: Tensor, keys: tuple[Tensor | None, ...], dtype: torch.dtype
) -> tuple[float, float]:
    x, y = (some.float().requires_grad_() for some in (x, y))
    exact_x, exact_y = (some.detach().to(dtype).double().requires_grad_() for some in (x, y))
    logits = exact_x @ exact_y.T
    if keys[0] is not None and keys[1] is not None:
        logits = logits.masked_fill(keys[0][:, None] == keys[1], float("-inf"))
    assert callable(reduction)
    found, wanted = reduction(x, y, *keys, dtype), (logits.logsumexp(1), logits.logsumexp(0))
    _weighed(found).backward()
    _weighed(wanted).backward()
    gradients = [(x.grad, exact_x.grad), (y.grad, exact_y.grad)]
    return (
        max(map(relative, found, wanted)),
        max(relative(one, other) for one, other in gradients if one is not None and other is not None),
    )


def _weighed(results: tuple[Tensor, ...]) -> Tensor:
    """Factors of both signs: gradients of rows and columns take part in each other's."""
    parts = [(some * torch.linspace(-1, 2, len(some), device=some.device, dtype=some.dtype)).sum() for some in results]
    return parts[0] + parts[1]


def _unit(count: int, setting: Setting) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, setting.choose(512, 21), dtype=torch.float64, generator=generator)
    return normalize(rows, dim=1).to(setting.place)
