"""Texts of unequal length with little padding: in groups of like length, each padded to its own longest text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

# One more group takes as long as this many weights of a layer's square take with one token: about here steps of widths
# of 128, 256 and 512 are fastest on a CPU; on a GPU, where it is the launch of kernels, it is a guess.
_WEIGHTS_PER_GROUP = {"cpu": 2**22, "cuda": 2**29}


@dataclass(frozen=True)
class LengthGroups:
    """The order of a batch's texts by length, and the groups (texts, tokens of each) that it is cut into.

    A network that maps each token by itself runs once over the tokens of all groups, one behind the other; only what
    tokens see of each other is computed group by group: those before it in its text, or where a group's mask, Bool
    [texts, 1, length, length], is true. No module is called more often for more groups, so the ranks of an engine that
    gathers weights may each have as many as their texts make.
    """

    order: Int64[Tensor, " texts"]
    shapes: tuple[tuple[int, int], ...]
    masks: tuple[Tensor, ...] | None = None

    @staticmethod
    def of(lengths: Int64[Tensor, " texts"], width: int) -> "LengthGroups":
        """The groups that cost a transformer of this width least: padding against one more group."""
        sizes = lengths.cpu().numpy()
        order = torch.from_numpy(np.argsort(sizes, kind="stable")).to(lengths.device)
        weights = _WEIGHTS_PER_GROUP.get(lengths.device.type, _WEIGHTS_PER_GROUP["cuda"])
        return LengthGroups(order, _cheapest(sizes, weights // width**2))

    def longer(self, tokens: int, masks: Sequence[Tensor]) -> "LengthGroups":
        """The same groups of texts that have so many tokens more, with masks."""
        shapes = tuple((count, length + tokens) for count, length in self.shapes)
        return replace(self, shapes=shapes, masks=tuple(masks))

    @cached_property
    def num_tokens(self) -> int:
        """The tokens of all groups, padding among them."""
        return sum(self._sizes)

    def flat(self, rows: Shaped[Tensor, "texts length ..."]) -> Shaped[Tensor, "tokens ..."]:
        """A batch's tokens, group behind group."""
        by_length = rows[self.order].split([count for count, _ in self.shapes])
        return torch.cat(
            [part[:, :length].flatten(0, 1) for part, (_, length) in zip(by_length, self.shapes, strict=True)]
        )

    def split(self, flat: Shaped[Tensor, "tokens ..."]) -> list[Tensor]:
        """Each group's tokens [texts, length, ...]: views."""
        parts = flat.split(list(self._sizes))
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def texts(self, values: Shaped[Tensor, "texts ..."]) -> list[Tensor]:
        """Each group's rows of what every text has one of."""
        return list(values[self.order].split([count for count, _ in self.shapes]))

    def in_order(self, groups: Sequence[Tensor]) -> Shaped[Tensor, "texts ..."]:
        """What every text has one of, group by group [texts, ...], as the batch had its texts."""
        return torch.cat(list(groups))[self._places]

    def padded(self, groups: Sequence[Tensor], length: int) -> Float[Tensor, "texts {length} ..."]:
        """The same of every token [texts, length, ...], with zeros behind each group's length."""
        rows = [
            torch.nn.functional.pad(part, (0, 0) * (part.ndim - 2) + (0, length - part.shape[1])) for part in groups
        ]
        return self.in_order(rows)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(count * length for count, length in self.shapes)

    @cached_property
    def _places(self) -> Tensor:
        """The place of each text in the order."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(self.order), device=self.order.device)
        return places


def _cheapest(sizes: NDArray[np.int64], per_group: int) -> tuple[tuple[int, int], ...]:
    """The cut of texts by length into groups with the least sum of padded tokens and `per_group` a group."""
    lengths, counts = np.unique(sizes, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    costs, starts = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=np.int64)
    for end in range(1, len(lengths) + 1):
        every = costs[:end] + (before[end] - before[:end]) * lengths[end - 1] + per_group
        starts[end] = int(np.argmin(every))
        costs[end] = every[starts[end]]
    shapes, end = [], len(lengths)
    while end:
        start = int(starts[end])
        shapes.append((int(before[end] - before[start]), int(lengths[end - 1])))
        end = start
    return tuple(reversed(shapes))
