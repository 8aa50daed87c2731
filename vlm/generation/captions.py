"""Captions on the way and at their end: tokens, log-likelihood, and which of them are done."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Marks:
    """The tokens that every caption begins and ends with."""

    start: int
    end: int


@dataclass(frozen=True)
class Limits:
    """The marks of captions, the tokens that they have behind the first at most, and before they may end."""

    marks: Marks
    max_length: int
    min_length: int


@dataclass(frozen=True)
class Generated:
    """A caption's tokens without its marks, and its log-likelihood, that of its end among it."""

    tokens: tuple[int, ...]
    log_likelihood: float


class Writing:
    """One caption of each image that is being written."""

    def __init__(self, num_images: int, limits: Limits, device: torch.device) -> None:
        self._limits = limits
        self.tokens: Int64[Tensor, "images length"] = torch.full((num_images, 1), limits.marks.start, device=device)
        self._ended: Bool[Tensor, " images"] = torch.zeros(num_images, dtype=torch.bool, device=device)
        self._log_likelihood: Float[Tensor, " images"] = torch.zeros(num_images, device=device)

    @property
    def num_generated(self) -> int:
        """The tokens that follow the first mark."""
        return self.tokens.shape[1] - 1

    @property
    def is_open(self) -> bool:
        """Whether any caption may go on."""
        return self.num_generated < self._limits.max_length and not bool(self._ended.all())

    def allowed(self, log_p: Float[Tensor, "images vocabulary"]) -> Float[Tensor, "images vocabulary"]:
        """The same, -inf for what must not come next: the first mark, and an end that is too early."""
        return allowed(log_p, self._limits, self.num_generated)

    def add(self, tokens: Int64[Tensor, " images"], log_p: Float[Tensor, "images vocabulary"]) -> None:
        """Add a token to each that has not ended, with its log-likelihood."""
        tokens = torch.where(self._ended, self._limits.marks.end, tokens)
        log_p_of_tokens = log_p.gather(1, tokens[:, None])[:, 0]
        self._log_likelihood += torch.where(self._ended, 0.0, log_p_of_tokens)
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        self._ended |= tokens == self._limits.marks.end

    def captions(self) -> list[Generated]:
        """All captions, in order."""
        likelihoods = self._log_likelihood.tolist()
        return [
            Generated(until_end(row, self._limits.marks), likelihood)
            for row, likelihood in zip(self.tokens[:, 1:].tolist(), likelihoods, strict=True)
        ]


def allowed(
    log_p: Float[Tensor, "... vocabulary"], limits: Limits, num_generated: int
) -> Float[Tensor, "... vocabulary"]:
    """Log-likelihoods of the next token, -inf for the first mark, and for the end before `min_length` tokens.

    A first mark that is the last one too, as GPT-2's, may come as the end.
    """
    log_p = log_p.clone()
    if limits.marks.start != limits.marks.end:
        log_p[..., limits.marks.start] = -torch.inf
    if num_generated < limits.min_length:
        log_p[..., limits.marks.end] = -torch.inf
    return log_p


def until_end(tokens: list[int], marks: Marks) -> tuple[int, ...]:
    """The tokens before the end."""
    return tuple(tokens[: tokens.index(marks.end)] if marks.end in tokens else tokens)
