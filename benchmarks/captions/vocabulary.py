"""Time and memory of the captioning loss over a whole vocabulary, in chunks and with all logits at once.

    python -P -m benchmarks.captions.vocabulary [--work WORK] [--turns 5]

64 captions of 32 tokens, a decoder width of 512 and CLIP's 49,408 tokens, fp32: forward and backward to states and
vocabulary, by this project's chunks, by torch's cross-entropy of all logits, and by open_clip's CoCaLoss (whose
contrastive half has weight 0). Time: the ways take turns in one process. Memory: what a fresh process's peak rises
above states and weights, the gradient of the vocabulary (101 MB) among it in all ways, and without it.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from open_clip.loss import CoCaLoss
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.processes import apart, peak_above
from benchmarks.result_cache import ResultCache, arguments_of_turns, machine
from vlm.model.token_likelihood import token_likelihood

CAPTIONS, LENGTH, WIDTH, VOCABULARY = 64, 32, 512, 49_408
GRADIENT_MB = WIDTH * VOCABULARY * 4 / 1e6


def chunks(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss as a run computes it."""
    return -token_likelihood(states, weight, labels)[:, 0].mean()


def plain(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's own, of all logits."""
    return cross_entropy(states @ weight, labels)


def coca_loss(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """open_clip's, of all logits."""
    loss = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0)
    logits = (states @ weight).unflatten(0, (CAPTIONS, LENGTH))
    rows = torch.zeros(1, 1)
    made: Tensor = loss(rows, rows, logits, labels.unflatten(0, (CAPTIONS, LENGTH)), torch.ones(()))[1]
    return made


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "vlm, in chunks": chunks,
    "torch, all logits": plain,
    "open_clip's CoCaLoss": coca_loss,
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """States, vocabulary and labels, none of which is padding."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(CAPTIONS * LENGTH, WIDTH, generator=generator).requires_grad_()
    weight = (torch.randn(WIDTH, VOCABULARY, generator=generator) * WIDTH**-0.5).requires_grad_()
    return states, weight, torch.randint(1, VOCABULARY, (CAPTIONS * LENGTH,), generator=generator)


def step(name: str, states: Tensor, weight: Tensor, labels: Tensor) -> tuple[float, float]:
    """The loss, and the seconds of its forward and backward."""
    states.grad = weight.grad = None
    began = time.perf_counter()
    loss = WAYS[name](states, weight, labels)
    loss.backward()
    return float(loss.detach()), time.perf_counter() - began


def measure_times(num_turns: int) -> dict[str, list[float]]:
    """Each way's times, turn by turn, after one that is not counted."""
    given = inputs()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    losses = {name: step(name, *given)[0] for name in WAYS}
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    for _ in range(num_turns):
        for name in WAYS:
            times[name].append(step(name, *given)[1])
    return times


def measure_peak(name: str) -> float:
    """By how many MB one step raises this process's peak."""
    given = inputs()
    return peak_above(lambda: step(name, *given))


def main() -> None:
    """Measure what is missing, then print the table."""
    arguments = arguments_of_turns(__doc__)
    if arguments.ask:
        functions: dict[str, Callable[[Any], Any]] = {"times": measure_times, "peak": measure_peak}
        what, argument = arguments.ask
        print(json.dumps(functions[what](argument)))
        return
    results = ResultCache(arguments.work, "captions-vocabulary", arguments.again)
    times = results("times", lambda: apart("benchmarks.captions.vocabulary", "times", arguments.turns))
    print(machine(), "\n")
    print("| 2,048 tokens of 49,408 | s, median (least to most) | of vlm's | peak MB | beside the gradient |")
    print("|---|---|---|---|---|")
    own = statistics.median(times["vlm, in chunks"])
    for name, found in times.items():
        peak = results(f"peak {name}", partial(apart, "benchmarks.captions.vocabulary", "peak", name))
        median = statistics.median(found)
        spread = f"{median:.2f} ({min(found):.2f} to {max(found):.2f})"
        print(f"| {name} | {spread} | {median / own:.2f} | {peak:.0f} | {peak - GRADIENT_MB:.0f} |")


if __name__ == "__main__":
    main()
