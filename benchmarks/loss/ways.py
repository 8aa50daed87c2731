"""The losses that are compared: this project's terms and open_clip's, on random or aligned pairs."""

from collections.abc import Callable
from typing import Any

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.functional import normalize

from vlm.batch import Batch
from vlm.distributed.world import World
from vlm.objectives.objective import Objective
from vlm.objectives.pairs import ExtraNegatives
from vlm.objectives.providers.extra_negatives import SharedNegatives
from vlm.objectives.recipe import Terms
from vlm.objectives.state import RunFacts
from vlm.objectives.step import PairStep
from vlm.objectives.term import Provider
from vlm.similarity.config import SimilarityConfig
from vlm.similarity.exchange import Exchange

DIM = 512
NUM_EXTRA = 1024
POSITIVES = 4  # rows of one label in the multi-positive variant

Leaves = dict[str, Tensor]
Way = Callable[[Leaves, World], Tensor]


class FixedColumns(Provider):
    """The same random columns at every step."""

    def negatives(self, step: PairStep) -> ExtraNegatives:
        columns = normalize(torch.randn(NUM_EXTRA, DIM, generator=torch.Generator().manual_seed(9)), dim=1)
        ids = torch.full((NUM_EXTRA,), -1)
        return SharedNegatives(step.pairs, {"image": columns, "text": columns}, (ids,))


def leaves(num_rows: int, scale: float, bias: float, world: World, kind: str = "random", dim: int = DIM) -> Leaves:
    """This rank's unit rows and the numbers of the loss. `aligned`: pairs at a cosine of about 0.9."""
    generator = torch.Generator().manual_seed(world.rank)
    image, text = (torch.randn(num_rows, dim, generator=generator) for _ in range(2))
    if kind == "aligned":
        text = image + 0.5 * text
    return {
        "image": normalize(image, dim=1).to(world.device).requires_grad_(),
        "text": normalize(text, dim=1).to(world.device).requires_grad_(),
        "scale": torch.tensor([scale], device=world.device, requires_grad=True),
        "bias": torch.tensor([bias], device=world.device, requires_grad=True),
    }


def term(objective: dict[str, Any], product: str = "fp32", exchange: str = "gather", *, extra: bool = False) -> Way:
    """An objective of this project."""
    similarity = SimilarityConfig.model_validate({"product": product, "exchange": exchange})
    terms = TypeAdapter(Terms).validate_python(objective)
    providers = {"benchmark_columns": FixedColumns()} if extra else {}
    made: dict[int, Objective] = {}

    def loss(rows: Leaves, world: World) -> Tensor:
        count = len(rows["image"])
        if (own := made.get(count)) is None:  # a run makes it once
            facts = RunFacts(rows["image"].shape[1], count, 1, 1, 0, world)
            own = made[count] = Objective(terms, providers, Exchange(world, similarity), facts)
        outputs = {name: rows[name] for name in ("image", "text")}
        outputs |= {"logit_scale": rows["scale"], "logit_bias": rows["bias"]}
        return own.evaluate(outputs, batch_of(count, world))[0]

    return loss


def peer_clip(*, low: bool, world: World) -> Way:
    """open_clip's ClipLoss in its exact setting for several ranks; `low`: under bf16 autocast."""
    loss_of = ClipLoss(local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.size)

    def loss(rows: Leaves, _: World) -> Tensor:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=low):
            value: Tensor = loss_of(rows["image"], rows["text"], rows["scale"][0])
        return value

    return loss


def peer_sigmoid(*, low: bool, world: World) -> Way:
    """open_clip's SigLipLoss; `low`: under bf16 autocast."""
    loss_of = SigLipLoss(rank=world.rank, world_size=world.size)

    def loss(rows: Leaves, _: World) -> Tensor:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=low):
            value: Tensor = loss_of(rows["image"], rows["text"], rows["scale"][0], rows["bias"][0])
        return value

    return loss


def ways(world: World) -> dict[str, Way]:
    """All that is measured, by name."""
    found: dict[str, Way] = {}
    for product, low in (("fp32", False), ("bf16", True)):
        labelled = {"multi_positive": {"by": "label"}}
        found |= {
            f"clip {product}": term({"clip": 1.0}, product),
            f"clip ring {product}": term({"clip": 1.0}, product, "ring"),
            f"sigmoid {product}": term({"sigmoid": 1.0}, product),
            f"multi_positive {product}": term(labelled, product),
            f"clip, {NUM_EXTRA} more columns {product}": term({"clip": 1.0}, product, extra=True),
            f"open_clip ClipLoss {product}": peer_clip(low=low, world=world),
            f"open_clip SigLipLoss {product}": peer_sigmoid(low=low, world=world),
        }
    return found


def batch_of(num_rows: int, world: World) -> Batch:
    """Rows without pictures, `POSITIVES` neighbours to a label."""
    ids = torch.arange(num_rows, device=world.device) + world.rank * num_rows
    return Batch(
        step=0,
        sample_ids=ids,
        keys=("",) * num_rows,
        parts={},
        labels=ids // POSITIVES,
    )
