"""Distance of the gathered CLIP loss's gradient from one process's, for vlm and open_clip, at several world sizes.

    python -P -m benchmarks.loss.gradient

Each rank holds its rows of one global batch and a linear tower for either side; gradients are averaged over ranks as
DDP does. Printed: relative error (norm of the difference over the norm) and norm ratio against one process on the whole
batch, for the towers and for the logit scale, in float64.
"""

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import normalize

from benchmarks.loss.ways import term
from vlm.distributed.world import World

BATCH, WIDTH, DIM = 48, 24, 16

Loss = Callable[[Tensor, Tensor, Tensor, World], Tensor]


def ours(image: Tensor, text: Tensor, scale: Tensor, world: World) -> Tensor:
    """This project's term."""
    return term({"clip": 1.0})({"image": image, "text": text, "scale": scale, "bias": scale}, world)


def open_clip_loss(local_loss: bool, gather_with_grad: bool) -> Loss:
    """open_clip's loss under its two flags."""

    def loss(image: Tensor, text: Tensor, scale: Tensor, world: World) -> Tensor:
        term = ClipLoss(
            local_loss=local_loss, gather_with_grad=gather_with_grad, rank=world.rank, world_size=world.size
        )
        value: Tensor = term(image, text, scale[0])
        return value

    return loss


WAYS: dict[str, Loss] = {
    "vlm": ours,
    "open_clip (its defaults)": open_clip_loss(False, False),
    "open_clip --gather-with-grad": open_clip_loss(False, True),
    "open_clip --local-loss": open_clip_loss(True, False),
    "open_clip --local-loss --gather-with-grad": open_clip_loss(True, True),
}


def gradients(loss: Loss, world: World) -> list[Tensor]:
    """The averaged gradients of both towers and the scale."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(BATCH, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    towers = [torch.randn(WIDTH, DIM, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    scale = torch.tensor([14.3], dtype=torch.float64, requires_grad=True)
    rows = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    image, text = normalize(images[rows] @ towers[0], dim=1), normalize(texts[rows] @ towers[1], dim=1)
    loss(image, text, scale, world).backward()
    averaged = []
    for leaf in (*towers, scale):
        assert leaf.grad is not None
        averaged.append(world.sum(leaf.grad) / world.size)
    return averaged


def work(rank: int, world_size: int, rendezvous: str) -> None:
    """One rank: compare every way with one process."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    reference = gradients(ours, World())
    for name, loss in WAYS.items():
        found = gradients(loss, World.current())
        towers, wanted = (torch.cat([g.flatten() for g in part[:2]]) for part in (found, reference))
        cells = [f"{world_size}", f"{name:42s}"]
        for one, other in ((towers, wanted), (found[2], reference[2])):
            error = torch.linalg.norm(one - other) / torch.linalg.norm(other)
            cells.append(f"{error.item():.1e}")
            cells.append(f"{(torch.linalg.norm(one) / torch.linalg.norm(other)).item():.4f}")
        if rank == 0:
            print("| " + " | ".join(cells) + " |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    print("| ranks | loss | towers: error | towers: norm ratio | scale: error | scale: norm ratio |")
    print("|---|---|---|---|---|---|")
    for world_size in arguments.ranks:
        port = torch.randint(20_000, 50_000, ()).item()
        spawn(work, args=(world_size, f"tcp://127.0.0.1:{port}"), nprocs=world_size)


if __name__ == "__main__":
    main()
