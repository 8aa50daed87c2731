"""What the parts are asked for (a device, and whether all is tiny), and what they find."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """The device by its kind (cuda, cpu), and whether all is tiny."""

    device: str
    quick: bool

    @property
    def place(self) -> torch.device:
        """The device itself."""
        return torch.device(self.device)

    def choose(self, usual: int, quick: int) -> int:
        """One of two sizes."""
        return quick if self.quick else usual

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


class Line(NamedTuple):
    """A thing that was compared: how far it is from what it has to be, and how far it may be. A NaN is too far."""

    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether it is near enough."""
        return self.error <= self.bound


def relative(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of what is wanted, in float64 on the CPU."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 in products of fp32 within the block."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@contextmanager
def noted_warnings() -> Iterator[list[str]]:
    """What is warned of by this project within the block, such as kernels that were given up."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    notes += [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
