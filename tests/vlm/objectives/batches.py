"""Batches and outputs as terms read them, without pictures and without a model."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlm.batch import Batch, BatchPart, Texts
from vlm.objectives.recipe import Terms  # noqa: F401 - its import registers all terms
from vlm.objectives.registry import TERMS
from vlm.objectives.term import PairTerm


def outputs_of(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    captions: Tensor | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The outputs of these embeddings; `parameters` by `term/name`."""
    optional = {"logit_bias": bias, "captions": captions, **(parameters or {})}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    return {"image": image, "text": text, "logit_scale": scale, **given}


def batch_of(
    samples: Tensor | Sequence[int] | int,
    *,
    step: int = 0,
    tokens: Tensor | None = None,
    labels: Tensor | None = None,
    caption_owners: Tensor | None = None,
) -> Batch:
    """Samples with these ids, or so many of them; without `tokens` they all have the same text."""
    ids = torch.arange(samples) if isinstance(samples, int) else torch.as_tensor(samples)
    tokens = torch.zeros(len(ids), 3, dtype=torch.int64) if tokens is None else tokens
    parts: dict[str, BatchPart] = {"text": _texts(tokens)}
    if caption_owners is not None:
        parts["captions"] = _texts(torch.zeros(len(caption_owners), 3, dtype=torch.int64), caption_owners)
    return Batch(step, ids, tuple(map(str, ids.tolist())), parts, labels)


def _texts(tokens: Tensor, owners: Tensor | None = None) -> Texts:
    return Texts(tokens, torch.full((len(tokens),), tokens.shape[1]), owners=owners)


def pair_terms() -> list[str]:
    """The names of all terms that compare rows, and need no more than pairs to do so."""
    kinds = {name: kind for name, kind in TERMS.all().items() if issubclass(kind, PairTerm)}
    return sorted(name for name, kind in kinds.items() if not kind().needs().batch_parts)
