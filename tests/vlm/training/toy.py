"""A model small enough for many engines and ranks, with every kind of parameter that engines treat differently."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlm.batch import Batch, BatchPart, Images, Texts
from vlm.model.logit_scale import limited_scale
from vlm.objectives.objective import Objective
from vlm.objectives.term import Term
from vlm.objectives.terms.clip import Clip
from vlm.outputs import module_key, output_name
from vlm.similarity.exchange import Exchange
from vlm.training.ema import Ema
from vlm.training.engines.base import Engine, EngineSettings
from vlm.training.engines.options import EngineOptions
from vlm.training.engines.registry import EngineName
from vlm.training.engines.start import build_engine, start_accelerator
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.optimizers.adamw import AdamW
from vlm.training.optimizers.base import OptimizerConfig
from vlm.training.optimizers.maker import OptimizerMaker
from vlm.training.optimizers.parameters import ParameterFacts, parameter_facts
from vlm.training.optimizers.rates import LrScale
from vlm.training.precision import Precision
from vlm.training.step import TrainState

GLOBAL_BATCH = 12
TERMS: dict[str, Term] = {"clip": Clip()}
HIDDEN = ("image.0.weight", "image.5.weight")
WHOLE = MicroBatchPlan(GLOBAL_BATCH, 1)


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
        self.logit_bias: nn.Parameter | None = None
        self.term_parameters = nn.ParameterDict()

    def forward(self, inputs: Mapping[str, BatchPart], outputs: frozenset[str]) -> dict[str, Tensor]:
        made = {"logit_scale": limited_scale(self.logit_scale)}
        if self.logit_bias is not None:
            made["logit_bias"] = self.logit_bias * 1
        made |= {output_name(key): parameter * 1 for key, parameter in self.term_parameters.items()}
        for name in sorted(outputs & inputs.keys()):
            part = inputs[name]
            if isinstance(part, Images):
                pixels = part.pixels.to(self.logit_scale.dtype).flatten(1) / 255
                rows = self.frozen(self.image(pixels)) + self.offset
            else:
                assert isinstance(part, Texts)
                tokens = self.text(part.tokens)
                rows = tokens.mean(1)
                if name == "text" and "text_tokens" in outputs:
                    made["text_tokens"] = tokens.to(self.logit_scale.dtype)
            made[name] = normalize(rows.to(self.logit_scale.dtype), dim=-1)
        return made

    def learn(self, parameters: Mapping[str, Tensor]) -> "ToyEncoder":
        """Take in what terms learn beside the model, by `term/name`."""
        for name, value in parameters.items():
            self.term_parameters[module_key(name)] = nn.Parameter(value.clone())
        return self


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
    optimizer: OptimizerConfig | None = None  # in place of AdamW with these numbers
    layer_factors: Mapping[str, float] = field(default_factory=dict)  # of the rate, by the name of a parameter
    options: EngineOptions = field(default_factory=EngineOptions)


def toy_model(setup: Setup, parameters: Mapping[str, Tensor] | None = None) -> ToyEncoder:
    """The toy, with what terms learn beside it."""
    model = ToyEncoder(setup.log_scale, setup.dropout).learn(parameters or {})
    return model.double() if setup.double else model


def start(
    setup: Setup, world_size: int, model: ToyEncoder | None = None, accelerator: Accelerator | None = None
) -> Engine:
    """The toy, or another model, under an engine, on this rank; ranks that have joined have an `accelerator`."""
    rows = GLOBAL_BATCH // world_size
    settings = EngineSettings(setup.engine, rows, setup.precision, setup.max_grad_norm, setup.options)
    adamw = AdamW(weight_decay=setup.weight_decay, beta1=setup.beta1, lr_scale=setup.lr_scale)
    accelerator = accelerator or start_accelerator(settings)
    model = model or toy_model(setup)
    config = setup.optimizer or adamw
    make_optimizer = OptimizerMaker(config, toy_facts(model, config, setup.layer_factors))
    return build_engine(settings, accelerator, model, make_optimizer)


def toy_facts(
    model: nn.Module, config: OptimizerConfig, layer_factors: Mapping[str, float]
) -> dict[str, ParameterFacts]:
    """What an optimizer knows of the toy's parameters: two decay not, and two are hidden matrices."""
    facts = parameter_facts(model, config.lr_scale, config.lr_decay)
    return {
        name: replace(
            one,
            decays=name not in ("logit_scale", "image.0.bias"),
            lr_factor=one.lr_factor * layer_factors.get(name, 1.0),
            hidden=name in HIDDEN,
        )
        for name, one in facts.items()
    }


def train_state(engine: Engine, ema: Ema | None = None) -> TrainState:
    """The toy with the plain objective."""
    return TrainState(engine, Objective(TERMS, exchange=Exchange(engine.world)), ema)


def toy_batch(step: int, rank: int, world_size: int, total: int = GLOBAL_BATCH) -> Batch:
    """This rank's rows of global batch `step` of `total` rows."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randint(0, 255, (total, 3, 4, 4), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, 50, (total, 5), generator=generator)
    rows = slice(rank * total // world_size, (rank + 1) * total // world_size)
    lengths = 1 + torch.arange(rows.start, rows.stop) * 3 % 5
    return Batch(
        step=step,
        sample_ids=torch.arange(rows.start, rows.stop),
        keys=tuple(str(row) for row in range(rows.start, rows.stop)),
        parts={"image": Images(images[rows]), "text": Texts(tokens[rows], lengths)},
    )
