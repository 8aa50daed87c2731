"""One forward of a new model, so that impossible sizes are refused when it is built and not in the first step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlm.errors import UserError, reason
from vlm.model.dual_encoder import DualEncoder

# Whatever open_clip, timm, transformers and torch raise about sizes that do not go together.
_FORWARD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def require_working(model: DualEncoder) -> None:
    """Raise UserError when a tower cannot take one input of its own size, or makes no embedding of its width."""
    size = model.image_spec.size
    with evaluating(model):
        with _refusing(f"the image tower cannot take images of {size} x {size} pixels"):
            _require_row(model.image(torch.zeros(1, 3, size, size, dtype=torch.uint8)), model.tower_dim)
        with _refusing(f"the text tower cannot take texts of {model.text.context_length} tokens"):
            _require_row(model.text(*model.tokenizer(["a"])), model.tower_dim)


def _require_row(made: torch.Tensor, width: int) -> None:
    if tuple(made.shape) != (1, width):
        raise ValueError(f"it makes {list(made.shape)} of one, not [1, {width}]")


@contextmanager
def _refusing(words: str) -> Iterator[None]:
    try:
        yield
    except _FORWARD_ERRORS as error:
        raise UserError(f"model: {words}: {reason(error)}") from error


@contextmanager
def evaluating(model: DualEncoder) -> Iterator[None]:
    """Run the block in evaluation mode; each module has its own mode again then."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
