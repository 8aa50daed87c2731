"""The choice of one token among those that may come next."""

from jaxtyping import Float, Int64
from torch import Tensor

from vlm.generation.config import GenerationConfig


def likeliest(log_p: Float[Tensor, "images vocabulary"]) -> Int64[Tensor, " images"]:
    """The likeliest token; the first of several."""
    return log_p.argmax(1)


def drawn(
    log_p: Float[Tensor, "images vocabulary"], draws: Float[Tensor, " images"], config: GenerationConfig
) -> Int64[Tensor, " images"]:
    """A token drawn among the likeliest: `config.k` of them, or the fewest with a probability of `config.p` together.

    The draw is that token at which the sum of probabilities, from the likeliest down, first exceeds `draws` of the sum
    of all. Temperature comes before the cut.
    """
    if config.method == "top_k":
        ordered, tokens = (log_p / config.temperature).topk(min(config.k, log_p.shape[1]), dim=1)
        sums = ordered.softmax(1).cumsum(1)
        total = sums[:, -1]
    else:
        ordered, tokens = (log_p / config.temperature).sort(dim=1, descending=True, stable=True)
        sums = ordered.softmax(1).cumsum(1)
        last = (sums < config.p).sum(1).clamp(max=sums.shape[1] - 1)
        total = sums.gather(1, last[:, None])[:, 0]
    place = (sums <= (draws * total)[:, None]).sum(1).clamp(max=sums.shape[1] - 1)
    return tokens.gather(1, place[:, None])[:, 0]


def contrastive_scores(
    probabilities: Float[Tensor, "... candidates"], likeness: Float[Tensor, "... candidates"], alpha: float
) -> Float[Tensor, "... candidates"]:
    """(1 - alpha) p - alpha max cos (Su & Collier, eq. 2): `likeness` is the largest cosine with an earlier token."""
    return (1 - alpha) * probabilities - alpha * likeness
