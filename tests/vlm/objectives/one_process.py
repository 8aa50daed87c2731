"""Terms on one process: pairs with given similarities, and a provider whose negatives are always the same."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tests.vlm.objectives.batches import batch_of, outputs_of
from vlm.objectives.objective import Objective
from vlm.objectives.pairs import ExtraNegatives
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
from vlm.objectives.term import Provider

FIXTURE = ((0.9, 0.1), (0.2, 0.8))
NUM_EXTRA = {"image": 2, "text": 3}


def value_of(
    name: str,
    image: Tensor,
    text: Tensor,
    scale: float,
    /,
    *,
    bias: float | None = None,
    labels: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The value of a term on a batch of distinct samples."""
    ids = torch.arange(len(image)) + 5
    batch = batch_of(ids, tokens=ids[:, None], labels=labels)
    logit_bias = None if bias is None else image.new_tensor([bias])
    outputs = outputs_of(image, text, image.new_tensor([scale]), logit_bias)
    value, _ = Objective({name: TERMS.find(name).model_validate(options)}).evaluate(outputs, batch)
    return value


def pairs_like(similarities: Tensor) -> tuple[Tensor, Tensor]:
    """Image and text rows with these similarities. Not of length 1: no term asks for that."""
    return torch.eye(len(similarities), dtype=similarities.dtype), similarities.T


def near_duplicates(count: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit rows of which all are nearly the same."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.ones(2, count, dim, dtype=torch.float64)
    rows += 1e-4 * torch.randn(rows.shape, dtype=torch.float64, generator=generator)
    image, text = (rows / rows.norm(dim=2, keepdim=True)).to(dtype)
    return image, text


def fixed_rows(modality: str, dim: int) -> Tensor:
    """The negatives that `FixedNegatives` provides."""
    generator = torch.Generator().manual_seed(17 if modality == "image" else 18)
    rows = torch.randn(NUM_EXTRA[modality], dim, dtype=torch.float64, generator=generator)
    lengths: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / lengths


class FixedNegatives(Provider):
    """Two images and three texts."""

    def negatives(self, step: PairStep) -> ExtraNegatives | None:
        return _Fixed()


FIXED_NEGATIVES: dict[str, dict[str, Any]] = {"tests.vlm.objectives.one_process:FixedNegatives": {}}


class _Fixed(ExtraNegatives):
    def num_columns(self, others: str) -> Tensor:
        raise NotImplementedError

    def log_sum_exp(self, queries: Tensor, others: str, scale: Tensor) -> Tensor:
        return (scale[:, None] * queries @ fixed_rows(others, queries.shape[1]).T).logsumexp(1)

    def softplus_sum(self, queries: Tensor, others: str, scale: Tensor, bias: Tensor) -> Tensor:
        return softplus(scale * queries @ fixed_rows(others, queries.shape[1]).T + bias, threshold=50).sum(1)
