"""What a rank sends: collectives and DDP in a group of one, and copies of batches to the device."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.setting import Line, Setting, full_precision, relative
from benchmarks.step.systems import batches, own_model
from vlm.batch import Batch
from vlm.model.dual_encoder import DualEncoder

_NUMBERS = 2**20
_PRODUCTS, _PRODUCT_ROWS = 20, 8192  # a fraction of a second on any GPU
_MEBI = 2**20


def check_group(setting: Setting) -> list[Line]:
    """A group of one rank by NCCL (gloo on a CPU): each collective returns its own part, and DDP the same gradients."""
    with _group(setting):
        lines = [Line(name, _difference(send, setting), 0.0) for name, send in _COLLECTIVES.items()]
        return [*lines, Line("gradients under DDP", _ddp_error(setting), 1e-5)]


@contextmanager
def _group(setting: Setting) -> Iterator[None]:
    backend = "nccl" if setting.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _sum(own: Tensor, out: Tensor) -> None:
    out.copy_(own)
    dist.all_reduce(out)


def _broadcast(own: Tensor, out: Tensor) -> None:
    out.copy_(own)
    dist.broadcast(out, 0)


_COLLECTIVES: Mapping[str, Callable[[Tensor, Tensor], object]] = {
    "sum": _sum,
    "broadcast": _broadcast,
    "gather": lambda own, out: dist.all_gather_into_tensor(out, own),
    "reduce-scatter": lambda own, out: dist.reduce_scatter_tensor(out, own),
}


def _difference(send: Callable[[Tensor, Tensor], object], setting: Setting) -> float:
    own = torch.arange(_NUMBERS, device=setting.place).float()
    out = torch.full_like(own, -1.0)
    send(own, out)
    setting.wait()
    return float((out - own).abs().max())


def _ddp_error(setting: Setting) -> float:
    """How far gradients under DDP are from those of the model alone."""
    batch = next(batches("tiny", None, pairs=16)).to(setting.place)
    found = []
    with full_precision():
        for wrapped in (False, True):
            model = own_model("tiny").to(setting.place)
            made = (DistributedDataParallel(model) if wrapped else model)(batch.parts, frozenset({"image", "text"}))
            (made["image"] * made["text"].flip(0) * made["logit_scale"]).sum().backward()
            found.append(_gradients(model))
    return relative(found[1], found[0])


def _gradients(model: DualEncoder) -> Tensor:
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def check_copies(setting: Setting) -> list[Line]:
    """A batch arrives as it was; on a GPU out of pinned memory, without waiting for what was to be computed before."""
    name = "tiny" if setting.quick else "b32"
    batch = next(batches(name, None, pairs=setting.choose(256, 16)))
    if setting.device != "cuda":
        return [Line("what arrives", _differing(batch, batch.to(setting.place)), 0.0)]
    pinned = batch.pin_memory()
    tensors = [pinned.pixels, pinned.texts.tokens, pinned.texts.lengths, pinned.sample_ids]
    waited, moved = _moved(pinned, setting)
    return [
        Line("tensors that are not pinned", float(sum(not tensor.is_pinned() for tensor in tensors)), 0.0),
        Line("copies that were waited for", waited, 0.0),
        Line("what arrives", _differing(batch, moved), 0.0),
        Line("seconds for a GiB of pinned memory", _seconds_of_gib(), 1.0),
    ]


def _moved(pinned: Batch, setting: Setting) -> tuple[float, Batch]:
    """1 if the device had done what it was busy with when the copy returned; and the copy, once it is there."""
    busy = torch.randn(_PRODUCT_ROWS, _PRODUCT_ROWS, device=setting.place)
    pinned.to(setting.place)  # memory that the device has handed out once
    torch.mm(busy, busy)
    setting.wait()
    done = torch.cuda.Event()
    for _ in range(_PRODUCTS):
        torch.mm(busy, busy)
    done.record()
    moved = pinned.to(setting.place)
    waited = float(done.query())
    setting.wait()
    return waited, moved


def _differing(one: Batch, other: Batch) -> float:
    """How many tensors differ."""
    pairs = [
        (one.pixels, other.pixels),
        (one.texts.tokens, other.texts.tokens),
        (one.texts.lengths, other.texts.lengths),
        (one.sample_ids, other.sample_ids),
    ]
    return float(sum(not torch.equal(a, b.cpu()) for a, b in pairs))


def _seconds_of_gib() -> float:
    here = torch.empty(256 * _MEBI, dtype=torch.uint8).pin_memory()
    there = here.to("cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(4):
        there.copy_(here, non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - began
