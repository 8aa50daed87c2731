"""Outputs of the model by name, and how those of several micro-batches are joined, weighed and cut apart again.

An output has a row for each row of something, such as `image` [samples, dim] and `text` [samples, dim] of the batch's
samples or `captions` [captions, dim] of its part of that name, or it is shared by all rows: `logit_scale` [1],
`logit_bias` [1] where the model has one, and `term/name` for what an objective's term learns beside the model.
`text_likelihood` [tokens, 2] are the log-likelihoods of the tokens of `text` under a captioning decoder (see
`vlm.model.token_likelihood`), of all but the first of each text, text after text; the same of `captions`, and of
`documents`, whose tokens see the images before them. `text_likelihood_from_text` are the same where the embedding of a
text stands in for the image's.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Outputs = Mapping[str, Tensor]
Sight = Literal["image", "text"]

PAIR = frozenset({"image", "text"})
_SHARED = frozenset({"logit_scale", "logit_bias"})
_LIKELIHOODS: Mapping[Sight, str] = {"image": "_likelihood", "text": "_likelihood_from_text"}
_SLASH = "__of__"  # in a module's keys, where neither `.` nor `/` are welcome


def likelihood_of(part: str, sight: Sight = "image") -> str:
    """The output with the likelihoods of the tokens of a part of texts, by what the decoder is shown."""
    return part + _LIKELIHOODS[sight]


def captioned_parts(outputs: Iterable[str], sight: Sight = "image") -> list[str]:
    """The parts of texts the likelihoods of whose tokens are among some outputs, in order."""
    end = _LIKELIHOODS[sight]
    return sorted(name.removesuffix(end) for name in outputs if name.endswith(end))


def stand_ins_of(part: str) -> str:
    """The part of a batch that says which texts stand in for images beside a part of texts."""
    return f"{part}_stand_ins"


def is_shared(name: str) -> bool:
    """Whether an output is the same for all rows."""
    return name in _SHARED or "/" in name


def term_parameters(outputs: Outputs, term: str) -> dict[str, Tensor]:
    """The outputs that a term learned beside the model, by their own names."""
    prefix = f"{term}/"
    return {name.removeprefix(prefix): tensor for name, tensor in outputs.items() if name.startswith(prefix)}


def module_key(name: str) -> str:
    """The key in a module of what a term learns, `term/name`."""
    return name.replace("/", _SLASH)


def output_name(key: str) -> str:
    """The output whose parameter has this key in a module."""
    return key.replace(_SLASH, "/")


def joined(outputs: Sequence[Outputs]) -> dict[str, Tensor]:
    """The outputs of several micro-batches as those of one."""
    if len(outputs) == 1:
        return dict(outputs[0])
    return {
        name: first if is_shared(name) else torch.cat([one[name] for one in outputs])
        for name, first in outputs[0].items()
    }


def split(outputs: Outputs, like: Sequence[Outputs]) -> list[dict[str, Tensor]]:
    """The rows of joined outputs as those of several micro-batches, of which each has as many; none that are shared."""
    names = [name for name in outputs if not is_shared(name)]
    if not names:
        return [{} for _ in like]
    rows = [outputs[name].split([len(one[name]) for one in like]) for name in names]
    return [dict(zip(names, of_one, strict=True)) for of_one in zip(*rows, strict=True)]


def gradients_at(loss: Float[Tensor, ""], leaves: Outputs) -> dict[str, Tensor]:
    """d loss / d leaf, by name; 0 where the loss does not depend on a leaf."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def loss_with(gradients: Outputs, outputs: Outputs) -> Float[Tensor, ""]:
    """A loss whose gradient at each output is the one given, and 0 where none is: engines wait for each parameter."""
    products = [(outputs[name] * gradient).sum() for name, gradient in gradients.items()]
    others = [0.0 * outputs[name].sum() for name in outputs.keys() - gradients.keys()]
    return torch.stack([*products, *others]).sum()
