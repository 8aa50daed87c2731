"""The keys of a recipe that say how a run trains."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlm.attention_choice import AttentionChoice
from vlm.checkpoint.retention import KeepConfig
from vlm.config import Config
from vlm.duration import Duration, PositiveDuration
from vlm.geometry.telemetry import TelemetryConfig
from vlm.model.part_blocks import Part
from vlm.objectives.recipe import Providers, Terms
from vlm.objectives.term import PairTerm
from vlm.objectives.terms.clip import Clip
from vlm.similarity.config import SimilarityConfig
from vlm.training.alarm import AlarmConfig
from vlm.training.ema import EmaConfig
from vlm.training.engines.options import LAYOUTS, EngineOptions
from vlm.training.engines.registry import EngineName
from vlm.training.image_schedule import ImageStage
from vlm.training.optimizers.adamw import AdamW
from vlm.training.optimizers.registry import AnyOptimizer
from vlm.training.precision import Precision, PrecisionChoice, faster_precision
from vlm.training.profile import ProfileConfig
from vlm.training.schedule import AnySchedule, CosineSchedule
from vlm.training.spikes import GuardConfig
from vlm.training.teacher import TeacherConfig


class TrainingConfig(Config):
    """How a run trains: length, batch, engine, optimizer, and what it records on the way."""

    seed: int = Field(default=0, ge=-(2**62), le=2**62, description="of first weights, order, crops and captions")
    duration: PositiveDuration = Field(
        default=Duration(10, "epochs"), description='length of the run: "40 epochs", "2000 steps" or "1.2M samples"'
    )
    global_batch: int = Field(default=256, gt=0, le=2**24, description="pairs a step, over all ranks")
    micro_batch: int | None = Field(
        default=None,
        gt=0,
        le=2**24,
        description="pairs that a rank puts through the towers at a time; null: all its pairs",
    )
    engine: EngineName = Field(
        default="ddp",
        description="ddp: whole weights on every rank; fsdp: torch's shards of them; zero1-3: DeepSpeed's",
    )
    engine_options: EngineOptions = Field(
        default=EngineOptions(), description="how it shares, what travels between ranks, and what leaves the GPU"
    )
    activation_checkpointing: tuple[Part, ...] = Field(
        default=(), description="parts whose blocks are computed again in the backward, and keep their input alone"
    )
    compile: tuple[Literal["image", "text"], ...] = Field(
        default=(),
        description="towers whose blocks torch.compile makes faster kernels of, where it can, in the first step's time",
    )
    precision: PrecisionChoice = Field(
        default="fp32",
        description="of the towers' products; weights and losses are fp32; auto: bf16 where the machine on which the "
        "run begins is faster in it",
    )
    attention: AttentionChoice = Field(
        default="auto",
        description="in our own blocks and open_clip's; fused: torch's operator; explicit: its steps; auto: by row "
        "length as measured here at a run's first start",
    )
    group_texts: bool = Field(
        default=True,
        description="in training, with little padding: open_clip's causal text towers take texts of like length in "
        "groups, several models of transformers take short ones in one row, each seeing itself alone",
    )
    objective: Terms = Field(default={"clip": Clip()}, description="terms by name: a weight, or weight and options")
    providers: Providers = Field(default={}, description="extra negatives and harder positives for the terms, by name")
    similarity: SimilarityConfig = Field(default=SimilarityConfig(), description="how pairs are compared across ranks")
    teacher: TeacherConfig = Field(default=TeacherConfig(), description="the average that some terms learn from")
    optimizer: AnyOptimizer = Field(default=AdamW(), description="the optimizer and its numbers")
    schedule: AnySchedule = Field(default=CosineSchedule(), description="the learning rate over the run")
    image_schedule: tuple[ImageStage, ...] = Field(
        default=(), description="stages that train on less of each image, one after another; behind them, whole images"
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, le=1e6, description="clip the gradient's norm to this; null: never"
    )
    hang_after: float | None = Field(
        default=900.0,
        ge=1,
        le=1e7,
        description="seconds without a step after which the run ends, naming who keeps the others waiting; null: never",
    )
    max_bad_steps: int = Field(
        default=3,
        gt=0,
        le=1_000_000,
        description="the run ends when so many steps in a row have a loss or gradient that is not finite",
    )
    guard: GuardConfig | None = Field(
        default=None, description="what is done about spikes of the loss or the gradient's norm; null: nothing"
    )
    profile: ProfileConfig | None = Field(default=None, description="steps whose time is looked at; null: none")
    ema: EmaConfig | None = Field(default=None, description="an average of the weights, which is evaluated; null: none")
    log_every: PositiveDuration = Field(default=Duration(10, "steps"), description="lines of metrics.jsonl")
    geometry: TelemetryConfig = Field(default=TelemetryConfig(), description="figures of the two clouds on the way")
    alarm: tuple[AlarmConfig, ...] = Field(default=(), description="figures that warn or stop when they move too far")
    checkpoint_every: PositiveDuration = Field(default=Duration(500, "steps"), description="states to go on from")
    keep_checkpoints: Annotated[int, Field(gt=0, le=10**6)] | KeepConfig | None = Field(
        default=2, description="the newest so many are kept, or what the keys below say; null: all"
    )
    checkpoint_in_background: bool = Field(
        default=True,
        description="training goes on while one is written; each rank keeps a copy of its share in host memory",
    )
    record_samples: bool = Field(default=False, description="write the sample keys that each step trained on")
    trackers: tuple[str, ...] = Field(
        default=("tensorboard",), description="accelerate's trackers by name: tensorboard, wandb"
    )

    @model_validator(mode="after")
    def _engine_carries_the_optimizer(self) -> "TrainingConfig":
        """Of an engine of the user's own this is asked when it is built."""
        if self.engine in LAYOUTS:
            words = self.optimizer.unfit_for(self.engine, LAYOUTS[self.engine], self.engine_options)
            if words is not None:
                raise ValueError(words)
        return self

    @property
    def decided_precision(self) -> Precision:
        """The precision of the towers' products: this machine's faster one where it is left open."""
        return faster_precision() if self.precision == "auto" else self.precision

    @property
    def comparison(self) -> SimilarityConfig:
        """How pairs are compared, the precision of products decided.

        bf16 where the towers are, whose own rounding is larger; but not where it could pick other pairs.
        """
        if self.similarity.product != "auto":
            return self.similarity
        picks = any(isinstance(term, PairTerm) and term.picks_pairs for term in self.objective.values())
        product = "bf16" if self.decided_precision == "bf16" and not picks else "fp32"
        return self.similarity.model_copy(update={"product": product})
