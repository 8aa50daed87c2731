"""Contrastive search: likely tokens whose states are unlike those before them (Su & Collier, 2023)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from vlm.generation.captions import Generated, Limits, Writing
from vlm.generation.choice import contrastive_scores
from vlm.generation.config import GenerationConfig
from vlm.generation.prefix import Prefixes


def contrastive_search(
    prefixes: Prefixes, limits: Limits, config: GenerationConfig, keep_going: Callable[[bool], bool]
) -> list[Generated]:
    """A caption of each image, in order.

    Each step adds every one of the k likeliest tokens to its caption, looks at their states behind the decoder's last
    norm, and goes on with the one of the highest score. The states that they are compared with are those of the
    caption's own tokens: neither the first mark's nor an image's.
    """
    num_images = len(prefixes)
    writing = Writing(num_images, limits, prefixes.device)
    logits = prefixes.append(writing.tokens[:, -1]).logits
    k = min(config.k, logits.shape[1])
    earlier: Tensor | None = None  # unit states of the tokens so far [images, length, width]
    images = torch.arange(num_images, device=prefixes.device)
    while keep_going(writing.is_open):
        log_p = log_softmax(logits.float(), dim=1)
        best, tokens = writing.allowed(log_p).topk(k, dim=1)
        prefixes.take(images.repeat_interleave(k))
        made = prefixes.append(tokens.flatten())
        states = normalize(made.states[:, -1].float(), dim=1).unflatten(0, (num_images, k))
        likeness = best.new_zeros(best.shape) if earlier is None else (states @ earlier.transpose(1, 2)).amax(2)
        scores = contrastive_scores(best.exp(), likeness, config.alpha)
        chosen = scores.masked_fill(best.isneginf(), -torch.inf).argmax(1)  # what must not come next is no candidate
        writing.add(tokens[images, chosen], log_p)
        prefixes.take(images * k + chosen)
        logits = made.logits.unflatten(0, (num_images, k))[images, chosen]
        state = states[images, chosen][:, None]
        earlier = state if earlier is None else torch.cat([earlier, state], 1)
    return writing.captions()
