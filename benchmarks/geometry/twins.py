"""The control: two image towers that see the very same pictures, from a start without a gap.

Whatever gap opens is then made by the contrastive loss, not by two modalities, by wrong captions, or by the start
(Fahim et al., 2024, section 4).
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.geometry.pictures import Pictures
from benchmarks.objectives.photos import training_batches
from benchmarks.objectives.run import WARMUP, WEIGHT_DECAY, Run, new_model
from eval.geometry import separability
from vlm.distributed.world import World
from vlm.geometry.clouds import centroid_gap
from vlm.model.towers import ImageTower
from vlm.objectives.step import pair_step
from vlm.objectives.terms.clip import Clip
from vlm.similarity.exchange import Exchange
from vlm.training.schedule import CosineSchedule, LearningRate

OBSERVATIONS = 40
NOISE = 0.01  # of each weight's own spread

Start = Literal["other weights", "same weights"]


@dataclass(frozen=True)
class Twins:
    """The settings of one control: `start` says how the second tower differs from the first before training."""

    start: Start
    seed: int
    lr: float
    num_samples: int
    batch: int = 64
    logit_scale: float = 100.0  # fixed, as in the paper


class _Twin(nn.Module):
    """A tower whose embeddings are centred before they are brought to length 1, by what is fixed at the start."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower
        self.centre: Tensor | float = 0.0

    def forward(self, images: Tensor) -> Tensor:
        return normalize(self.tower(images) - self.centre, dim=1)

    @torch.no_grad()
    def centre_on(self, images: Tensor) -> None:
        self.centre = torch.cat([self.tower(part) for part in images.split(250)]).mean(0)


def measure_twins(twins: Twins, pictures: Pictures) -> dict[str, Any]:
    """Train both towers on pairs of a picture with itself; the gap and separability on the way and at the end."""
    torch.set_num_threads(1)
    first, second = _towers(twins, pictures)
    watched = pictures.watched.centres()
    for twin in (first, second):
        twin.centre_on(watched)
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=twins.lr, weight_decay=WEIGHT_DECAY)
    num_steps = twins.num_samples // twins.batch
    every = max(1, num_steps // OBSERVATIONS)
    rate = LearningRate(CosineSchedule(), twins.lr, round(WARMUP * num_steps), num_steps)
    scale, exchange, term = torch.tensor([twins.logit_scale]), Exchange(World()), Clip()
    seen = [(0, *_observed(first, second, watched))]
    for batch in training_batches(pictures.train, twins.batch, num_steps, twins.seed):
        for group in optimizer.param_groups:
            group["lr"] = rate(batch.step)
        outputs = {"image": first(batch.pixels), "text": second(batch.pixels), "logit_scale": scale}
        optimizer.zero_grad()
        term(pair_step(outputs, batch, exchange)).backward()
        optimizer.step()
        if (batch.step + 1) % every == 0:
            seen.append(((batch.step + 1) * twins.batch, *_observed(first, second, watched)))
    return {"seen": seen}


def _towers(twins: Twins, pictures: Pictures) -> tuple[_Twin, _Twin]:
    vocabulary = int(pictures.train.tokens.max()) + 1
    first, other = (
        new_model(Run("twins", twins.batch, seed, twins.lr, 0, "test", {}), vocabulary).image
        for seed in (twins.seed, twins.seed + 1000)
    )
    if twins.start == "other weights":
        return _Twin(first), _Twin(other)
    second = copy.deepcopy(first)
    generator = torch.Generator().manual_seed(twins.seed)
    with torch.no_grad():
        for weight in second.parameters():
            spread = weight.std(correction=0) if weight.numel() > 1 else weight.abs().sum()
            weight.add_(NOISE * spread * torch.randn(weight.shape, generator=generator))
    return _Twin(first), _Twin(second)


@torch.no_grad()
def _observed(first: _Twin, second: _Twin, images: Tensor) -> tuple[float, float, float]:
    """The centroid gap, the separability, and the share of pictures whose twin is nearest."""
    x, y = (torch.cat([twin(part) for part in images.split(250)]) for twin in (first, second))
    nearest = float(((x @ y.T).argmax(1) == torch.arange(len(x))).double().mean())
    return centroid_gap(x, y)[0], separability(x, y), nearest
