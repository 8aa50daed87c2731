"""A training step beside open_clip's: forward, loss, backward, clipping and update in bf16.

    python -P -m benchmarks.step.against_open_clip [--work WORK] [--turns 5] [--captions 'SHARDS'] [--models small b32]

open_clip: its model, `ClipLoss` and step (autocast, clipping at 1, AdamW by its script's groups, the scale's bound), of
pixels that are normalised beforehand. vlm: `train_step` with a recipe's defaults, of 8-bit pixels; and the same with
one thing switched off. All ways take turns in one process, another one first in each, with the same batches. Memory:
what a fresh process's peak rises in a step above its model and moments. Captions are those of `SHARDS` (webdataset),
and token counts as the web's: log-normal, mean 16.6, at most 75.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip_train.precision import get_autocast
from torch import nn

from benchmarks.processes import apart, peak_above
from benchmarks.result_cache import ResultCache, machine
from benchmarks.step.captions import batches_of_ids
from vlm.batch import Batch, Images, Texts
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.training.assembly import assemble, build_objective
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.optimizers import AdamW
from vlm.training.step import train_step


class PlainAdamW(AdamW):
    """AdamW as open_clip makes it."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps)


CONTEXT = 77
SMALL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 112, "layers": 6, "width": 256, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 6},
}
MODELS: Mapping[str, tuple[str, int, int]] = {  # title, batch, pixels a side
    "small": ("22 M parameters, 112 px, batch 256", 256, 112),
    "b32": ("ViT-B/32, 224 px, batch 32", 32, 224),
}
PEER, OWN = "open_clip", "vlm"
OFF: Mapping[str, dict[str, Any]] = {
    OWN: {},
    "vlm, texts padded to the longest": {"group_texts": False},
    "vlm, fused attention": {"attention": "fused"},
    "vlm, products of pairs in fp32": {"similarity": {"product": "fp32"}},
    "vlm, AdamW not fused": {"optimizer": PlainAdamW()},
}
Step = Callable[[Batch], float]


class Peer:
    """open_clip's model and step."""

    def __init__(self, name: str) -> None:
        self.model: Any = open_clip.create_model("ViT-B-32") if name == "b32" else open_clip.CLIP(**SMALL)
        self.model.output_dict = True
        self.model.train()
        self.optimizer = torch.optim.AdamW(_groups(self.model), lr=1e-4, betas=(0.9, 0.98), eps=1e-6)
        self.loss = open_clip.ClipLoss()
        self.autocast = get_autocast("amp_bf16", device_type="cpu")
        means, stds = (
            torch.tensor(values).view(3, 1, 1)
            for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        self.means, self.stds = means, stds

    def __call__(self, batch: Batch) -> float:
        """The seconds of a step."""
        pixels, texts = (batch.pixels / 255 - self.means) / self.stds, batch.texts.tokens
        tokens = nn.functional.pad(texts, (0, CONTEXT - texts.shape[1]))
        began = time.perf_counter()
        self.optimizer.zero_grad()
        with self.autocast():
            losses = self.loss(**self.model(pixels, tokens), output_dict=True)
        losses["contrastive_loss"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, norm_type=2.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, np.log(100))
        return time.perf_counter() - began


class Own:
    """A recipe's model and step."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        pairs = MODELS[name][1]
        settings = EngineSettings("ddp", pairs, "bf16", 1.0)
        accelerator = start_accelerator(settings)
        chosen = {"open_clip": "ViT-B-32"} if name == "b32" else {"architecture": SMALL}
        model = build_model(ModelConfig.model_validate(chosen), seed=0)
        config = TrainingConfig(global_batch=pairs, precision="bf16", **options)
        objective = build_objective(config, model, pairs, World())
        self.state = assemble(config, settings, accelerator, model, objective)
        self.state.engine.module.train()
        self.plan = MicroBatchPlan(pairs, 1)

    def __call__(self, batch: Batch) -> float:
        """The seconds of a step."""
        began = time.perf_counter()
        train_step(self.state, batch, self.plan, 0, 1e-4)
        return time.perf_counter() - began


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Its script's groups: gains, biases and scales do not decay."""
    named = list(model.named_parameters())
    plain = [value for name, value in named if value.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
    known = {id(value) for value in plain}
    rest = [value for _, value in named if id(value) not in known]
    return [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]


def make_step(way: str, name: str) -> Step:
    """A model with the step of a way."""
    return Peer(name) if way == PEER else Own(name, OFF[way])


def batches(name: str, captions: str | None, seed: int = 0) -> Iterator[Batch]:
    """Images of noise with texts of real or drawn token counts."""
    _, pairs, size = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    for number, (tokens, lengths) in enumerate(batches_of_ids(captions, pairs, seed)):
        images = torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8, generator=generator)
        parts = {"image": Images(images), "text": Texts(tokens, lengths)}
        yield Batch(step=number, sample_ids=torch.arange(pairs), keys=("",) * pairs, parts=parts)


def measure_times(asked: tuple[str, str | None, int, list[str]]) -> dict[str, list[float]]:
    """Each way's times, turn by turn, after one that is not counted."""
    name, captions, turns, ways = asked
    steps = {way: make_step(way, name) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn, batch in zip(range(turns + 1), batches(name, captions), strict=False):
        first = turn % len(ways)
        for way in (*ways[first:], *ways[:first]):
            took = steps[way](batch)
            if turn:
                times[way].append(took)
    return times


def measure_peak(asked: tuple[str, str | None, str]) -> float:
    """By how many MB a step raises this process's peak, with moments made before."""
    name, captions, way = asked
    step, several = make_step(way, name), batches(name, captions)
    step(next(several))
    return peak_above(lambda: step(next(several)))


def shown(times: Mapping[str, list[float]], peaks: Mapping[str, float], title: str, captions: str) -> None:
    """Print a table."""
    print(f"\n{title}; captions {captions}\n")
    print("| step | s, median (least to most) | open_clip's / its | vlm's / its | peak MB |\n|---|---|---|---|---|")
    medians = {way: statistics.median(found) for way, found in times.items()}
    for way, found in times.items():
        peak = f"{peaks[way]:.0f}" if way in peaks else ""
        ratios = f"{medians[PEER] / medians[way]:.2f} | {medians[OWN] / medians[way]:.2f}"
        print(f"| {way} | {medians[way]:.3f} ({min(found):.3f} to {max(found):.3f}) | {ratios} | {peak} |")


def main() -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--captions", help="shards whose captions are taken too, beside those as the web's")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=[PEER, *OFF], default=[PEER, *OFF])
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured")
    parser.add_argument("--ask", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask:
        functions: dict[str, Callable[[Any], Any]] = {"times": measure_times, "peak": measure_peak}
        print(json.dumps(functions[arguments.ask[0]](arguments.ask[1])))
        return
    results = ResultCache(arguments.work, "step", arguments.again)
    ask = partial(apart, "benchmarks.step.against_open_clip")
    kinds = {"as the web's": None} | ({"of the shards": arguments.captions} if arguments.captions else {})
    print(machine())
    for name in arguments.models:
        for words, captions in kinds.items():
            asked = (name, captions, arguments.turns, arguments.ways)
            times = results(f"times {name}, captions {words}, {arguments.turns}", partial(ask, "times", asked))
            peaks = {
                way: results(f"peak {name}, captions {words}, {way}", partial(ask, "peak", (name, captions, way)))
                for way in (PEER, OWN)
            }
            shown(times, peaks, MODELS[name][0], words)


if __name__ == "__main__":
    main()
