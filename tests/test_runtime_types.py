"""Annotations are checked while tests run: types everywhere, and the shapes that one call's tensors share."""

import pytest
import torch
from jaxtyping import TypeCheckError

from tests.ranks import run_ranks
from vlm.similarity.gram import gram
from vlm.terminal import printable


def call_both_wrongly() -> None:
    with pytest.raises(TypeCheckError, match="text=7"):
        printable(7)  # type: ignore[arg-type]
    assert gram(torch.ones(3, 2), torch.ones(3, 5)).shape == (2, 5)
    with pytest.raises(TypeCheckError, match="rows"):
        gram(torch.ones(3, 2), torch.ones(4, 5))


def test_wrong_types_and_shapes_are_found_here() -> None:
    call_both_wrongly()


def test_and_in_ranks() -> None:
    run_ranks(call_both_wrongly, 1, group=False)
