"""Texts of unequal length with little padding: several in a row, one behind the other, each seeing its own tokens."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class PackedTexts:
    """The places of a batch's texts in rows that are as long as the longest of them.

    For networks that take positions and a mask of queries and keys: one call maps all rows, whatever their number.
    Texts are numbered from 0 in the order of the batch; padding at the end of a row belongs to none, -1.
    """

    text: Int64[Tensor, "rows row_length"]
    position: Int64[Tensor, "rows row_length"]  # of a token in its text
    places: Int64[Tensor, "texts row_length"]  # of each text's tokens in all rows; where it has none, any
    is_token: Bool[Tensor, "texts row_length"]

    @staticmethod
    def of(lengths: Int64[Tensor, " texts"]) -> "PackedTexts":
        """The longest first, each into the row with the least room that is enough."""
        sizes = lengths.cpu().numpy()
        steps = np.arange(sizes.max())
        starts, num_rows = _best_fit(sizes)
        is_token = steps < sizes[:, None]
        places = np.where(is_token, starts[:, None] + steps, 0)
        text, position = np.full(num_rows * len(steps), -1), np.zeros(num_rows * len(steps), dtype=np.int64)
        text[places[is_token]], position[places[is_token]] = np.nonzero(is_token)
        arrays = (text.reshape(num_rows, -1), position.reshape(num_rows, -1), places, is_token)
        return PackedTexts(*(torch.from_numpy(array).to(lengths.device) for array in arrays))

    def ids(self, tokens: Int64[Tensor, "texts length"], pad_id: int) -> Int64[Tensor, "rows row_length"]:
        """The tokens in their rows."""
        return tokens[self.text.clamp(min=0), self.position].masked_fill(self.text < 0, pad_id)

    def mask(self, *, is_causal: bool) -> Bool[Tensor, "rows 1 row_length row_length"]:
        """True where a token may look: at its own text's, up to itself where that is so. Padding sees padding."""
        same = self.text[:, :, None] == self.text[:, None, :]
        return (same.tril() if is_causal else same)[:, None]

    def texts(self, states: Float[Tensor, "rows row_length width"]) -> Float[Tensor, "texts row_length width"]:
        """What belongs to each text, with zeros behind it."""
        return states.flatten(0, 1)[self.places] * self.is_token[:, :, None]


def _best_fit(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Where each text starts in all rows, which are as long as the longest, and how many rows there are."""
    length, num_rows = int(sizes.max()), 0
    starts = np.zeros(len(sizes), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by how many tokens still fit
    for text in np.argsort(-sizes, kind="stable"):
        size = int(sizes[text])
        room = next((room for room in range(size, length + 1) if with_room[room]), None)
        if room is None:
            row, room, num_rows = num_rows, length, num_rows + 1
        else:
            row = with_room[room].pop()
        starts[text] = (row + 1) * length - room
        with_room[room - size].append(row)
    return starts, num_rows
