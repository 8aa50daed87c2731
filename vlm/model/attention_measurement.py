"""The measurement by which attention is computed in the way that is fastest here, made once for each shape."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from vlm.attention_choice import AttentionShape, AttentionWay, MeasuredAttention
from vlm.distributed.world import World
from vlm.measurements import measured_once
from vlm.model.attention import WAYS, Attention, Block

_LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
_PRODUCTS = {"cpu": 2**26, "cuda": 2**33}  # of queries with keys, numbers multiplied: about 50 ms forward and back
_MOST_ROWS = 256
_TURNS = 3
_GAIN = 1.05  # less would be noise
_LOST = 1.5  # by so much the explicit way is slower where longer rows need not be tried
_CANDIDATES: Mapping[str, tuple[AttentionWay, ...]] = {
    "cpu": ("fused", "explicit"),
    "cuda": ("fused", "explicit", "flash", "memory_efficient", "cudnn"),
}


def measure_attention(
    model: torch.nn.Module, dtype: torch.dtype, world: World, known: Iterable[MeasuredAttention] = ()
) -> tuple[MeasuredAttention, ...]:
    """What is fastest for each shape of attention in our own blocks, which go by it from here on. Collective.

    `known` are measurements to go on with: those of a checkpoint, so that a run computes as it began. Others come from
    this machine's cache, or are made by rank 0, for all ranks alike.
    """
    device = world.device.type
    shapes = dict(_shapes(model, device, str(dtype).removeprefix("torch.")))
    found = {one.shape: one for one in known}
    missing = [shape for shape in dict.fromkeys(shapes.values()) if shape not in found]
    if missing:
        made = [_measured(shape) for shape in missing] if world.is_main else []
        made, *_ = world.gather_objects(made)
        found |= {one.shape: one for one in made}
    for module, shape in shapes.items():
        module.measured = found[shape]
    return tuple(found[shape] for shape in dict.fromkeys(shapes.values()))


def _shapes(model: torch.nn.Module, device: str, dtype: str) -> Iterable[tuple[Attention, AttentionShape]]:
    """The attention modules, and what is measured for each: causal rows, but in image towers and across to a memory."""
    for name, block in model.named_modules():
        if isinstance(block, Block):
            is_causal = not (name.startswith("image.") or block.is_cross)
            heads, width = block.attn.heads, block.attn.out_proj.in_features
            shape = {"device": device, "dtype": dtype, "heads": heads, "head_dim": width // heads}
            yield block.attn, AttentionShape.model_validate({**shape, "is_causal": is_causal})


def _measured(shape: AttentionShape) -> MeasuredAttention:
    key = {**shape.model_dump(mode="json"), "threads": torch.get_num_threads()}
    return measured_once("attention", key, MeasuredAttention, partial(_fastest, shape))


def _fastest(shape: AttentionShape) -> MeasuredAttention:
    """The fastest way for each length, until the explicit one is hopeless."""
    ways: list[tuple[int, AttentionWay]] = []
    for length in _LENGTHS:
        times = _times(shape, length)
        best = min(times, key=times.__getitem__)
        ways.append((length, best if times[best] * _GAIN < times["fused"] else "fused"))
        if shape.device == "cpu" and times["explicit"] > _LOST * times["fused"]:
            break
    return MeasuredAttention(shape=shape, ways=tuple(_without_repeats(ways)))


def _without_repeats(ways: Sequence[tuple[int, AttentionWay]]) -> list[tuple[int, AttentionWay]]:
    """The same choice with one entry for lengths in a row that have the same way."""
    return [entry for entry, after in zip(ways, [*ways[1:], (0, None)], strict=True) if entry[1] != after[1]]


def _times(shape: AttentionShape, length: int) -> dict[AttentionWay, float]:
    """Seconds of each way forward and backward, the least of interleaved turns; of ways that work here at all."""
    device, dtype = torch.device(shape.device), getattr(torch, shape.dtype)
    products = _PRODUCTS.get(shape.device, _PRODUCTS["cuda"])
    rows = max(1, min(_MOST_ROWS, products // (shape.heads * length**2 * shape.head_dim)))
    # As a projection leaves them: queries, keys and values of a token side by side.
    numbers = (rows, length, 3, shape.heads, shape.head_dim)
    projected = torch.randn(numbers, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    grad = torch.ones(rows, shape.heads, length, shape.head_dim, device=device, dtype=dtype)
    runs: dict[AttentionWay, Callable[[], None]] = {}
    for way in _CANDIDATES.get(shape.device, ("fused", "explicit")):
        run: Callable[[], None] = partial(_run, way, projected, grad, is_causal=shape.is_causal)
        try:
            run()
        except RuntimeError:  # a kernel that this device, type or shape lacks
            continue
        runs[way] = run
    times: dict[AttentionWay, float] = {}
    for _ in range(_TURNS):
        for way, run in runs.items():
            times[way] = min(_seconds(run, device), times.get(way, torch.inf))
    return times


def _run(way: AttentionWay, projected: Tensor, grad: Tensor, *, is_causal: bool) -> None:
    queries, keys, values = projected.permute(2, 0, 3, 1, 4)
    torch.autograd.grad(WAYS[way](queries, keys, values, None, is_causal=is_causal), projected, grad)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
