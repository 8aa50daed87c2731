"""Beam search: the likeliest caption among several that are followed at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax

from vlm.generation.captions import Generated, Limits, allowed
from vlm.generation.config import GenerationConfig
from vlm.generation.prefix import Prefixes


@dataclass
class _Best:
    """The best caption of one image that has ended."""

    penalty: float
    caption: Generated | None = None
    score: float = -math.inf

    def add(self, tokens: Sequence[int], log_likelihood: float) -> None:
        """Take a caption that has ended, if it is better."""
        score = self.score_of(log_likelihood, len(tokens) + 1)
        if self.caption is None or score > self.score:
            self.caption, self.score = Generated(tuple(tokens), log_likelihood), score

    def score_of(self, log_likelihood: float, length: int) -> float:
        """The log-likelihood over the length, the end among it, to the power of the penalty."""
        return float(log_likelihood / length**self.penalty)

    def cannot_be_beaten(self, likeliest: float, longest: int) -> bool:
        """Whether no open caption can come to a better score, the likeliest of them being so likely.

        Likelihoods only fall, and none is divided by more than the longest length.
        """
        return self.score >= self.score_of(likeliest, longest)


def beam_search(
    prefixes: Prefixes, limits: Limits, config: GenerationConfig, keep_going: Callable[[bool], bool]
) -> list[Generated]:
    """The caption of the best score of each image, in order."""
    num_images, beams, device = len(prefixes), config.beams, prefixes.device
    ended = [_Best(config.length_penalty) for _ in range(num_images)]
    tokens = torch.full((num_images, 1), limits.marks.start, device=device)
    sums = torch.zeros(num_images, 1, device=device)  # log-likelihoods of the open captions, image by image
    generated = tokens.new_zeros(num_images, 1, 0)
    logits = prefixes.append(tokens[:, 0]).logits
    is_open, length = True, 0
    while keep_going(is_open and length < limits.max_length):
        log_p = allowed(log_softmax(logits.float(), dim=1), limits, length).unflatten(0, (num_images, -1))
        # Twice as many as are followed: at most one of each caption's continuations is its end.
        totals = (sums[:, :, None] + log_p).flatten(1)
        best, places = totals.topk(min(2 * beams, totals.shape[1]), dim=1)
        parents, following = places // log_p.shape[2], places % log_p.shape[2]
        ends = following == limits.marks.end
        for number, place in (ends[:, :beams] & best[:, :beams].isfinite()).nonzero().tolist():
            ended[number].add(generated[number, parents[number, place]].tolist(), float(best[number, place]))
        length += 1
        # Those that go on are the likeliest of the others: a stable sort moves what has ended behind them, and where
        # there are too few others it cannot go on all the same.
        best = best.masked_fill(ends, -torch.inf)
        going = ends.to(torch.int8).sort(dim=1, stable=True).indices[:, :beams]
        sums, parents, following = (values.gather(1, going) for values in (best, parents, following))
        generated = torch.cat(
            [generated.gather(1, parents[:, :, None].expand(-1, -1, generated.shape[2])), following[:, :, None]], 2
        )
        tops = sums.amax(1).tolist()
        is_open = not all(one.cannot_be_beaten(top, limits.max_length) for one, top in zip(ended, tops, strict=True))
        before = log_p.shape[1]
        prefixes.take((torch.arange(num_images, device=device)[:, None] * before + parents).flatten())
        if length < limits.max_length:
            logits = prefixes.append(following.flatten()).logits
    return [_answer(*of_image) for of_image in zip(ended, generated.tolist(), sums.tolist(), strict=True)]


def _answer(ended: _Best, generated: list[list[int]], sums: list[float]) -> Generated:
    """The best caption that has ended, or where none has, the likeliest of the longest."""
    if ended.caption is not None:
        return ended.caption
    place = max(range(len(sums)), key=sums.__getitem__)
    return Generated(tuple(generated[place]), sums[place])
