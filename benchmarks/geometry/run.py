"""One short training run on photographs and scenes, and where it leaves the two clouds of embeddings."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.geometry.pictures import SCENES, Pictures
from benchmarks.objectives.photos import Photos, training_batches
from benchmarks.objectives.run import (
    ARCHITECTURE,
    WARMUP,
    WEIGHT_DECAY,
    Run,
    embeddings,
    new_model,
    new_state,
    ranks_of,
)
from vlm.geometry.clouds import centroid_gap
from vlm.model.dual_encoder import DualEncoder
from vlm.tensor_file import save_tensors
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.schedule import CosineSchedule, LearningRate
from vlm.training.step import train_step

OBSERVATIONS = 40  # of the gap on the way


@dataclass(frozen=True)
class GeometryRun(Run):
    """The settings of one run; `start` names the run whose weights it goes on from."""

    start: str | None = None
    base: str | None = None  # the row that its row is compared with

    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        held = {name: value for name, value in asdict(self).items() if name != "base"}
        return {**held, "architecture": ARCHITECTURE, "optimizer": {"weight_decay": WEIGHT_DECAY}, "scenes": SCENES}


def measure(run: GeometryRun, pictures: Pictures, work: Path, key: str) -> dict[str, Any]:
    """Train on one thread, then embed what is held out: its pairs go to a file of `work`, with the weights."""
    torch.set_num_threads(1)
    model = new_model(run, int(pictures.train.tokens.max()) + 1)
    if run.start is not None:
        own_scale = model.logit_scale.detach().clone()
        model.load_state_dict(load_file(weights_file(work, run.start)))
        if "init_logit_scale" in run.model:
            model.logit_scale.data.copy_(own_scale)
    state = new_state(run, model, len(pictures.train))
    plan = MicroBatchPlan(run.batch, 1)
    rate = LearningRate(CosineSchedule(), run.lr, round(WARMUP * run.num_steps), run.num_steps)
    every = max(1, run.num_steps // OBSERVATIONS)
    losses, gaps = [], [(0, watched_gap(model, pictures.watched))]
    began = time.perf_counter()
    model.train()
    for batch in training_batches(pictures.train, run.batch, run.num_steps, run.seed):
        losses.append(float(train_step(state, batch, plan, run.seed, rate(batch.step)).loss_output.loss))
        if (batch.step + 1) % every == 0:
            gaps.append(((batch.step + 1) * run.batch, watched_gap(model, pictures.watched)))
    took = time.perf_counter() - began
    save_tensors(weights_file(work, key), {name: tensor.clone() for name, tensor in model.state_dict().items()})
    return {
        **held_out(model, pictures, work, key),
        "gaps": gaps,
        "seconds": took,
        "loss": sum(losses[-10:]) / len(losses[-10:]),
        "logit_scale": model.logit_scale.exp().item(),
    }


def held_out(model: DualEncoder, pictures: Pictures, work: Path, key: str) -> dict[str, Any]:
    """Ranks both ways on photographs and scenes, and which single objects are named rightly."""
    found: dict[str, Any] = {}
    pairs: dict[str, Tensor] = {}
    for name, split in (("photos", pictures.photos), ("scenes", pictures.scenes)):
        images, texts = embeddings(model, split)
        found[name] = ranks_of(images, texts)
        first = texts.unflatten(0, (len(images), -1))[:, 0]
        pairs |= {f"{name}/image": images.contiguous(), f"{name}/text": first.contiguous()}
    images, _ = embeddings(model, Photos(pictures.single.images, *_texts(pictures.single, 1)))
    _, prompts = embeddings(model, pictures.prompts)
    classes = normalize(prompts.unflatten(0, (len(pictures.prompts), -1)).mean(1), dim=1)
    found["named"] = ((images @ classes.T).argmax(1) == pictures.labels).int().tolist()
    save_tensors(pairs_file(work, key), pairs)
    return found


def watched_gap(model: DualEncoder, watched: Photos) -> float:
    """The distance of the centroids of photographs and their first captions."""
    images, texts = embeddings(model, Photos(watched.images, *_texts(watched, 1)))
    return centroid_gap(images, texts)[0]


def weights_file(work: Path, key: str) -> Path:
    """The file in which a run leaves its weights."""
    return _folder(work / "weights") / f"{key}.safetensors"


def pairs_file(work: Path, key: str) -> Path:
    """The file in which a run leaves its held-out pairs: images and first captions."""
    return _folder(work / "pairs") / f"{key}.safetensors"


def _texts(photos: Photos, captions: int) -> tuple[Tensor, Tensor]:
    return photos.tokens[:, :captions], photos.lengths[:, :captions]


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
