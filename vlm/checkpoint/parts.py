"""Tensors of a checkpoint that are cut over the ranks: each writes its part, and no rank joins the whole."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Size, Tensor

from vlm.errors import UserError

CUT = "cut"
"""The key of a file's metadata under which JSON says where its parts begin, and how large the whole tensors are."""


@dataclass(frozen=True)
class Part:
    """A run of a tensor's elements, in their order: what one rank has to write of it; none where another has it.

    Attributes:
        values: the elements, in one dimension.
        start: how many elements are before them.
        shape: of the whole tensor.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]


Saved = Tensor | Part
"""What a rank has of a tensor that is to be written: its part, or the whole, as all others have."""


def cut_metadata(parts: Mapping[str, Part]) -> dict[str, str]:
    """The metadata of a file with these parts."""
    return {CUT: json.dumps({name: [part.start, list(part.shape)] for name, part in parts.items()})} if parts else {}


def read_cut(metadata: Mapping[str, str] | None) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Where the parts in a file begin, and the shapes of their tensors, by name.

    Raises:
        ValueError: the metadata says nothing of the kind.
    """
    text = (metadata or {}).get(CUT)
    if text is None:
        return {}
    cut, found = {}, json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it is no mapping")  # noqa: TRY004 - of what stands in a file
    for name, (start, shape) in found.items():
        if not all(isinstance(number, int) and number >= 0 for number in (start, *shape)):
            raise ValueError(f"{name} has no such place")
        cut[name] = (start, tuple(shape))
    return cut


@dataclass(frozen=True)
class Piece:
    """A tensor, or a part of one, in a file.

    Attributes:
        file: where it lies.
        shape: of the whole tensor.
        start: of the part; None for a whole tensor.
        size: how many elements are there.
    """

    file: Path
    shape: tuple[int, ...]
    start: int | None
    size: int


def in_order(pieces: Sequence[Piece], what: str) -> list[Piece]:
    """The pieces of one tensor from its first element to its last.

    Raises:
        UserError: they are not all of it, each once; it begins with `what`.
    """
    if len(pieces) == 1 and pieces[0].start is None:
        return list(pieces)
    ordered = sorted(pieces, key=lambda piece: -1 if piece.start is None else piece.start)
    end = 0
    for piece in ordered:
        if piece.start != end or piece.shape != ordered[0].shape:
            raise UserError(f"{what} is in parts that do not fit together")
        end += piece.size
    if end != Size(ordered[0].shape).numel():
        raise UserError(f"{what} is not whole: {end:,} of its {Size(ordered[0].shape).numel():,} elements are there")
    return ordered
