"""The training steps of open_clip and of vlm, of one model, on one rank or on several."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import open_clip
import torch
import torch.distributed as dist
from open_clip_train.precision import get_autocast
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step.captions import batches_of_ids
from vlm.batch import Batch, Images, Texts
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.training.assembly import assemble, build_objective
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.step import train_step

CONTEXT = 77
SMALL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 112, "layers": 6, "width": 256, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 6},
}
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MODELS: Mapping[str, tuple[str, int, int]] = {  # title, batch, pixels a side
    "small": ("22 M parameters, 112 px, batch 256", 256, 112),
    "b32": ("ViT-B/32, 224 px, batch 32", 32, 224),
}
SIZES: Mapping[str, int] = {"tiny": 32, "small": 112, "b32": 224, "b16": 224}  # pixels a side of all that can be built
_NAMED = {"b32": "ViT-B-32", "b16": "ViT-B-16"}
_WRITTEN: Mapping[str, dict[str, Any]] = {"tiny": TINY, "small": SMALL}


def own_model(name: str) -> DualEncoder:
    """The model of this name as a recipe builds it."""
    chosen = {"open_clip": _NAMED[name]} if name in _NAMED else {"architecture": _WRITTEN[name]}
    return build_model(ModelConfig.model_validate(chosen), seed=0)


class Peer:
    """open_clip's model and step; on several ranks under torch's DDP, with the exact setting of its loss.

    Its script's `--torchcompile` is `compiled`.
    """

    def __init__(self, name: str, device: str = "cpu", *, compiled: bool = False) -> None:
        model: Any = open_clip.create_model(_NAMED[name]) if name in _NAMED else open_clip.CLIP(**_WRITTEN[name])
        model.output_dict = True
        self.plain = model.train().to(device)
        self.optimizer = torch.optim.AdamW(_groups(model), lr=1e-4, betas=(0.9, 0.98), eps=1e-6)
        world = World.current()
        self.model = DistributedDataParallel(model) if world.size > 1 else model
        if compiled:
            self.model = torch.compile(self.model)
        self.loss = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.size)
        self.autocast = get_autocast("amp_bf16", device_type=device)
        means, stds = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        self.means, self.stds = means, stds

    def __call__(self, batch: Batch) -> float:
        """The seconds of a step."""
        prepared = self.prepare(batch)
        began = time.perf_counter()
        self.step(*prepared)
        return time.perf_counter() - began

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pixels that are normalised, and texts of full length."""
        texts = batch.texts.tokens
        return (batch.pixels / 255 - self.means) / self.stds, nn.functional.pad(texts, (0, CONTEXT - texts.shape[1]))

    def step(self, pixels: Tensor, tokens: Tensor) -> None:
        """Forward, loss, backward, clipping and update."""
        self.optimizer.zero_grad()
        with self.autocast():
            losses = self.loss(**self.model(pixels, tokens), output_dict=True)
        losses["contrastive_loss"].backward()
        nn.utils.clip_grad_norm_(self.plain.parameters(), 1.0, norm_type=2.0)
        self.optimizer.step()
        with torch.no_grad():
            self.plain.logit_scale.clamp_(0, np.log(100))


class Own:
    """A recipe's model and step."""

    def __init__(self, name: str, options: Mapping[str, Any], pairs: int | None = None) -> None:
        pairs = MODELS[name][1] if pairs is None else pairs
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        settings = EngineSettings("ddp", pairs // ranks, "bf16", 1.0)
        accelerator = start_accelerator(settings)
        model = own_model(name)
        config = TrainingConfig(global_batch=pairs, precision="bf16", **options)
        objective = build_objective(config, model, pairs, World.current(accelerator.device))
        self.state = assemble(config, settings, accelerator, model, objective)
        self.state.engine.module.train()
        self.plan = MicroBatchPlan(pairs, ranks)

    def __call__(self, batch: Batch) -> float:
        """The seconds of a step."""
        began = time.perf_counter()
        train_step(self.state, batch, self.plan, 0, 1e-4)
        return time.perf_counter() - began


def batches(name: str, captions: str | None, seed: int = 0, pairs: int | None = None) -> Iterator[Batch]:
    """A rank's images of noise with texts of real or drawn token counts."""
    world, size = World.current(), SIZES[name]
    pairs = MODELS[name][1] if pairs is None else pairs
    rows, seed = pairs // world.size, seed + world.rank
    generator = torch.Generator().manual_seed(seed)
    for number, (tokens, lengths) in enumerate(batches_of_ids(captions, rows, seed)):
        images = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=generator)
        parts = {"image": Images(images), "text": Texts(tokens, lengths)}
        ids = torch.arange(rows) + world.rank * rows
        yield Batch(step=number, sample_ids=ids, keys=("",) * rows, parts=parts)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """open_clip's groups of parameters: gains, biases and scales do not decay."""
    named = list(model.named_parameters())
    plain = [value for name, value in named if value.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
    known = {id(value) for value in plain}
    rest = [value for _, value in named if id(value) not in known]
    return [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
