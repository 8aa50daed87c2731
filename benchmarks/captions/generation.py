"""Speed of generated captions: with a cache, without, and by open_clip's `generate` on the same weights.

    python -P -m benchmarks.captions.generation [--work WORK] [--turns 3]

open_clip's coca_ViT-B-32 with fresh weights, 32 tokens for each of 8, or of 32, drawn pictures, the image tower's
forward included: greedy, and by a beam of 6. The ways take turns in one process, on one core; times are those that the
process had it. open_clip's `generate` looks for a class that transformers 5 no longer has, and then refuses to run at
all: here it is told to go on, which its drawn and greedy captions can do without that class, and its beam search
cannot.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip import coca_model
from torch import Tensor
from transformers import TopKLogitsWarper

from benchmarks.processes import apart
from benchmarks.result_cache import ResultCache, arguments_of_turns, machine
from vlm.generation.captioner import CaptionGenerator
from vlm.generation.config import GenerationConfig
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.open_clip_names import to_open_clip

NAME, LENGTH, BEAMS, NUMS_IMAGES = "coca_ViT-B-32", 32, 6, (8, 32)


def models() -> tuple[DualEncoder, Any]:
    """This project's model, and open_clip's with the same weights."""
    ours = build_model(ModelConfig(open_clip=NAME)).eval()
    with torch.no_grad():
        assert ours.decoder is not None
        ours.decoder.vocabulary.weight[:, 49407] = -1.0 * ours.decoder.vocabulary.weight.abs().max()
    theirs = open_clip.create_model(NAME).eval()
    coca_model._has_transformers = True
    coca_model.GENERATION_TYPES["top_k"] = TopKLogitsWarper
    theirs.load_state_dict(to_open_clip(ours))
    return ours, theirs


@torch.no_grad()
def uncached(model: DualEncoder, images: Tensor) -> list[list[int]]:
    """Greedy by the whole beginning at each step, which is what a cache saves."""
    tokens = torch.full((len(images), 1), 49406)
    image = model.encode_image_and_tokens(images)[1]
    assert model.decoder is not None
    while tokens.shape[1] <= LENGTH:
        states = model.text(tokens, torch.full((len(images),), tokens.shape[1])).tokens
        logits = model.decoder(states, image).logits
        logits[:, 49406:] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(1, keepdim=True)], 1)
    return tokens[:, 1:].tolist()


def ways(images: Tensor) -> dict[str, Callable[[], Any]]:
    """All ways of the same work."""
    ours, theirs = models()
    ids = torch.arange(len(images))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ours.image.spec.mean, ours.image.spec.std))
    pixels = (images / 255 - mean) / std

    def own(**options: Any) -> Callable[[], Any]:
        config = GenerationConfig.model_validate({"max_length": LENGTH, "min_length": LENGTH - 1, **options})
        return lambda: CaptionGenerator(ours, config).captions(images, ids)

    def peer(**options: Any) -> Callable[[], Any]:
        return lambda: theirs.generate(pixels, seq_len=LENGTH + 1, min_seq_len=LENGTH, **options)

    return {
        "greedy: vlm": own(),
        "greedy: vlm without cache": lambda: uncached(ours, images),
        "greedy: open_clip (top_k 1)": peer(generation_type="top_k", top_k=1),
        "beam of 6: vlm": own(method="beam", beams=BEAMS),
    }


def measure_times(num_images: int, num_turns: int) -> dict[str, list[float]]:
    """Each way's times, turn by turn, after one that is not counted."""
    torch.set_num_threads(1)
    images = torch.randint(0, 255, (num_images, 3, 224, 224), dtype=torch.uint8)
    all_ways = ways(images)
    times: dict[str, list[float]] = {name: [] for name in all_ways}
    for turn in range(num_turns + 1):
        for name, work in all_ways.items():
            began = time.process_time()
            work()
            if turn:
                times[name].append(time.process_time() - began)
    return times


def main() -> None:
    """Measure what is missing, then print the tables."""
    arguments = arguments_of_turns(__doc__)
    if arguments.ask:
        print(json.dumps(measure_times(*arguments.ask[1])))
        return
    results = ResultCache(arguments.work, "captions-generation", arguments.again)
    print(machine())
    for num_images in NUMS_IMAGES:
        asked = [num_images, arguments.turns]
        times = results(f"times {num_images}", partial(apart, "benchmarks.captions.generation", "times", asked))
        print(f"\n| {num_images} images, {LENGTH} tokens each | core seconds, median (least to most) | of vlm's |")
        print("|---|---|---|")
        for name, found in times.items():
            own = statistics.median(times[f"{name.partition(':')[0]}: vlm"])
            median = statistics.median(found)
            print(f"| {name} | {median:.2f} ({min(found):.2f} to {max(found):.2f}) | {median / own:.2f} |")


if __name__ == "__main__":
    main()
