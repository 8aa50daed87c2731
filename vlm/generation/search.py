"""The captions of images: token after token by a way of choosing, each image on its own."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax

from vlm.generation.beam import beam_search
from vlm.generation.captions import Generated, Limits, Writing
from vlm.generation.choice import drawn, likeliest
from vlm.generation.config import GenerationConfig
from vlm.generation.contrastive import contrastive_search
from vlm.generation.prefix import Prefixes

# Asked before each step whether another is needed: here, or on another rank with which every forward is shared.
KeepGoing = Callable[[bool], bool]


def generate(
    prefixes: Prefixes,
    limits: Limits,
    config: GenerationConfig,
    draws: Float[Tensor, "images max_length"] | None = None,
    keep_going: KeepGoing = bool,
) -> list[Generated]:
    """A caption of each image, in order.

    `draws` are uniform numbers of [0, 1), an image's own for each token, where tokens are drawn, and only there.
    """
    if config.method == "beam" and config.beams > 1:
        return beam_search(prefixes, limits, config, keep_going)
    if config.method == "contrastive" and config.alpha > 0 and config.k > 1:
        return contrastive_search(prefixes, limits, config, keep_going)
    writing = Writing(len(prefixes), limits, prefixes.device)
    logits = prefixes.append(writing.tokens[:, -1]).logits
    while keep_going(writing.is_open):
        log_p = log_softmax(logits.float(), dim=1)
        allowed = writing.allowed(log_p)
        tokens = likeliest(allowed) if draws is None else drawn(allowed, draws[:, writing.num_generated], config)
        writing.add(tokens, log_p)
        if writing.num_generated < limits.max_length:
            logits = prefixes.append(writing.tokens[:, -1]).logits
    return writing.captions()
