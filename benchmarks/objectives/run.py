"""One short training run on Flickr8k with one objective, and the ranks by which its towers find their matches."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.objectives.photos import SIZE, Photos, training_batches
from eval.encoder import embed_texts, evaluation_mode
from eval.ranks import find_matches
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.tokenizer import TokenBatch
from vlm.training.assembly import assemble, build_objective
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.randomness import seed_step
from vlm.training.schedule import CosineSchedule, LearningRate
from vlm.training.step import TrainState, train_step
from vlm.training.teacher import TeacherConfig

WARMUP = 0.1  # share of the steps
TEACHER = TeacherConfig(decay=0.995)
WEIGHT_DECAY = 0.1
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 64, "head_width": 32, "layers": 3},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 1},
}


@dataclass(frozen=True)
class Run:
    """The settings of one run; two runs with the same fields give the same ranks."""

    row: str
    batch: int
    seed: int
    lr: float
    num_samples: int
    split: str
    objective: dict[str, Any]
    providers: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people and file names."""
        return f"{self.row.replace(' ', '')}-{self.batch}-{self.seed}"

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.num_samples // self.batch

    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        optimizer = {"weight_decay": WEIGHT_DECAY}
        return {**asdict(self), "architecture": ARCHITECTURE, "optimizer": optimizer, "teacher": TEACHER.decay}


def new_model(run: Run, vocabulary: int) -> DualEncoder:
    """The towers with fresh weights, the same for all objectives at the same seed.

    Of the embeddings of tokens those of the first `vocabulary` ids are left: all others would be most of the weights.
    """
    model = build_model(ModelConfig.model_validate({"architecture": ARCHITECTURE, **run.model}), seed=run.seed)
    embedding = next(module for module in model.text.modules() if isinstance(module, torch.nn.Embedding))
    embedding.weight = torch.nn.Parameter(embedding.weight.detach()[:vocabulary].clone())
    embedding.num_embeddings = vocabulary
    return model


def measure(run: Run, photos: dict[str, Photos]) -> dict[str, Any]:
    """Train on one thread, then rank: `image_to_text` has a rank an image, `text_to_image` one a caption."""
    torch.set_num_threads(1)
    train = photos["train"]
    model = new_model(run, int(train.tokens.max()) + 1)
    state = new_state(run, model, len(train))
    plan = MicroBatchPlan(run.batch, 1)
    rate = LearningRate(CosineSchedule(), run.lr, round(WARMUP * run.num_steps), run.num_steps)
    losses = []
    began, used = time.perf_counter(), time.process_time()
    model.train()
    for batch in training_batches(train, run.batch, run.num_steps, run.seed):
        losses.append(float(train_step(state, batch, plan, run.seed, rate(batch.step)).loss_output.loss))
    took, used = time.perf_counter() - began, time.process_time() - used
    return {
        **ranks(model, photos[run.split]),
        "seconds": took,
        "core_seconds": used,
        "loss": sum(losses[-10:]) / len(losses[-10:]),
        "logit_scale": model.logit_scale.exp().item(),
    }


def ranks(model: DualEncoder, photos: Photos) -> dict[str, list[int]]:
    """Of every image the rank of its best caption, of every caption (image by image, in order) that of its image."""
    return ranks_of(*embeddings(model, photos))


def embeddings(model: DualEncoder, photos: Photos) -> tuple[Tensor, Tensor]:
    """Unit rows [images, dim] and [images x captions, dim]."""
    with evaluation_mode(model):
        images = torch.cat([model.encode_image(part) for part in photos.centres().split(250)])
        captions = TokenBatch(photos.tokens.flatten(0, 1), photos.lengths.flatten())
        return images, embed_texts(model, captions, World(), 250)


def ranks_of(images: Tensor, texts: Tensor) -> dict[str, list[int]]:
    """Both directions' ranks of rows whose texts come image by image."""
    owners = torch.arange(len(images))[:, None]
    text_owners = owners.repeat_interleave(len(texts) // len(images), dim=0)
    return {
        "image_to_text": find_matches(images, texts, owners, text_owners).ranks.tolist(),
        "text_to_image": find_matches(texts, images, text_owners, owners).ranks.tolist(),
    }


def new_state(run: Run, model: DualEncoder, num_samples: int) -> TrainState:
    """The engine and objective that take the steps of a run."""
    seed_step(run.seed, 0, 0)
    config = TrainingConfig.model_validate(
        {
            "seed": run.seed,
            "duration": f"{run.num_steps} steps",
            "global_batch": run.batch,
            "objective": run.objective,
            "providers": run.providers,
            "teacher": TEACHER,
            "optimizer": {"lr": run.lr, "weight_decay": WEIGHT_DECAY},
        }
    )
    settings = EngineSettings("ddp", run.batch, max_grad_norm=1.0)
    objective = build_objective(config, model, num_samples, World())
    return assemble(config, settings, start_accelerator(settings), model, objective)
