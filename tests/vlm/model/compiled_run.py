"""Compiled blocks beside plain ones, in a process whose functions are not wrapped for checks: those cannot be captured.

Prints the number of captured frames, and the largest difference of embeddings and gradients relative to their size.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.vlm.model.tiny import tiny_model
from vlm.model.compiled import compile_blocks
from vlm.model.dual_encoder import DualEncoder


def with_gradients(model: DualEncoder, longest: int) -> list[Tensor]:
    """The embeddings of three pairs, and the gradients of the towers' weights."""
    generator = torch.Generator().manual_seed(longest)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 1000, (3, longest), generator=generator)
    lengths = torch.tensor([longest, 2, longest - 1])
    rows = [model.encode_image(images), model.encode_text(tokens, lengths)]
    total = torch.stack([(row * torch.linspace(-1, 1, row.numel()).view(row.shape)).sum() for row in rows]).sum()
    trained = [value for name, value in model.named_parameters() if name.startswith(("image.", "text."))]
    return [*rows, *torch.autograd.grad(total, trained)]


def main() -> None:
    """With `counted`, what is captured is run as it is, and no compiler is needed."""
    counter, compiler = CompileCounter(), torch.compile
    if sys.argv[1] == "counted":
        counted: Callable[..., Any] = lambda function, **options: compiler(function, backend=counter, **options)  # noqa: E731
        torch.compile = counted
    model, plain = tiny_model(), tiny_model()
    model.train()
    plain.train()
    compile_blocks(model, ("image", "text"))
    worst = 0.0
    for longest in (3, 9, 16, 5):
        for one, other in zip(with_gradients(model, longest), with_gradients(plain, longest), strict=True):
            worst = max(worst, float((one - other).detach().norm() / other.detach().norm().clamp(min=1e-6)))
    same_names = model.state_dict().keys() == plain.state_dict().keys()
    sys.stdout.write(json.dumps({"frames": counter.frame_count, "worst": worst, "same_names": same_names}) + "\n")


if __name__ == "__main__":
    main()
