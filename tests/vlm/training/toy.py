"""A model small enough for many engines and ranks, with every kind of parameter that engines treat differently."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlm.batch import Batch
from vlm.model.logit_scale import limited_scale
from vlm.objectives.clip import Clip
from vlm.objectives.objective import Objective
from vlm.objectives.term import Term
from vlm.similarity.exchange import Exchange
from vlm.training.accumulation import MicroBatches
from vlm.training.build_engine import build_engine, start_accelerator
from vlm.training.ema import Ema
from vlm.training.engine import Engine, EngineName, Precision
from vlm.training.optimizer import LrScale, OptimizerConfig, build_optimizer
from vlm.training.step import Learner

GLOBAL_BATCH = 12
TERMS: dict[str, Term] = {"clip": Clip()}
WHOLE = MicroBatches(GLOBAL_BATCH, 1)


class ToyEncoder(nn.Module):
    """Two towers with a large and a small weight, norms, an embedding, a frozen part, a buffer and the scale."""

    def __init__(self, log_scale: float = 2.659, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(
            nn.Linear(48, 600),
            nn.GELU(),
            nn.LayerNorm(600),
            nn.Linear(600, 300),
            nn.Dropout(dropout),
            nn.Linear(300, 16),
        )
        self.text = nn.Embedding(50, 16)
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.register_buffer("offset", torch.full((16,), 0.01))
        self.logit_scale = nn.Parameter(torch.full([1], log_scale))

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image = self.frozen(self.image(images.to(self.logit_scale.dtype).flatten(1) / 255)) + self.offset
        text = self.text(tokens).mean(1)
        scale = limited_scale(self.logit_scale)
        return normalize(image.to(scale.dtype), dim=-1), normalize(text.to(scale.dtype), dim=-1), scale, None


@dataclass(frozen=True)
class Setup:
    """How to start the toy."""

    engine: EngineName = "ddp"
    precision: Precision = "fp32"
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.1
    lr_scale: LrScale = field(default_factory=LrScale)
    log_scale: float = 2.659
    beta1: float = 0.9
    dropout: float = 0.0
    double: bool = False


def start(setup: Setup, world_size: int) -> Engine:
    """The toy under an engine, on this rank."""
    accelerator = start_accelerator(
        setup.engine,
        rows_per_rank=GLOBAL_BATCH // world_size,
        precision=setup.precision,
        max_grad_norm=setup.max_grad_norm,
    )
    model = ToyEncoder(setup.log_scale, setup.dropout)
    if setup.double:
        model.double()
    config = OptimizerConfig(weight_decay=setup.weight_decay, beta1=setup.beta1, lr_scale=setup.lr_scale)
    optimizer = build_optimizer(model, config, {"logit_scale", "image.0.bias"})
    return build_engine(
        setup.engine,
        accelerator,
        model,
        optimizer,
        precision=setup.precision,
        max_grad_norm=setup.max_grad_norm,
    )


def learner_of(engine: Engine, ema: Ema | None = None) -> Learner:
    """The toy with the plain objective."""
    return Learner(engine, Objective(TERMS, exchange=Exchange(engine.world)), ema)


def toy_batch(step: int, rank: int, world_size: int, total: int = GLOBAL_BATCH) -> Batch:
    """This rank's rows of global batch `step` of `total` rows."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randint(0, 255, (total, 3, 4, 4), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, 50, (total, 5), generator=generator)
    rows = slice(rank * total // world_size, (rank + 1) * total // world_size)
    count = rows.stop - rows.start
    return Batch(
        step=step,
        images=images[rows],
        tokens=tokens[rows],
        lengths=torch.full((count,), 5),
        sample_ids=torch.arange(rows.start, rows.stop),
        keys=tuple(str(row) for row in range(rows.start, rows.stop)),
    )
