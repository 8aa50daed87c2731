"""Random numbers named by seed, step and sample, never by rank or history: any world size draws the same."""

import hashlib
import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_STEP = -0x61C8864680B583EB  # the signed form of 0x9E3779B97F4A7C15
_MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1))  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniforms(seed: int, step: int, ids: Int64[Tensor, " rows"], stream: str, count: int) -> Float[Tensor, "rows count"]:
    """`count` numbers of U[0, 1) for each id, in float64: a hash of (stream, seed, step, id, place).

    `stream` tells apart what is drawn for one id in one step. (Each id's numbers are SplitMix64's from a state of its
    own: Steele, Lea and Flood, 2014.)
    """
    return _uniforms(words(seed, step, ids, stream), count)


def words(seed: int, step: int, ids: Int64[Tensor, " rows"], stream: str) -> Int64[Tensor, " rows"]:
    """A word of 64 bits for each id, to draw from where seed and step are no longer known."""
    return _mixed(ids ^ _hash(f"{stream}\x1f{seed}\x1f{step}"))


def numbered(words: Int64[Tensor, " rows"], numbers: Int64[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
    """Words for the first, second, ... thing of each of these."""
    return _mixed(words ^ _mixed(numbers))


def below(words: Int64[Tensor, " rows"], limits: Int64[Tensor, " rows"], stream: str) -> Int64[Tensor, " rows"]:
    """A whole number from 0 to below its limit out of each word."""
    return (_uniforms(_mixed(words ^ _hash(stream)), 1)[:, 0] * limits).long()


def normals(words: Int64[Tensor, " rows"], count: int, stream: str) -> Float[Tensor, "rows count"]:
    """`count` numbers of N(0, 1) out of each word, in float64 (Box and Muller, 1958)."""
    u, v = _uniforms(_mixed(words ^ _hash(stream)), 2 * count).chunk(2, dim=1)
    return (-2 * torch.log1p(-u)).sqrt() * (2 * math.pi * v).cos()


def symmetric_beta(
    seed: int, step: int, ids: Int64[Tensor, " rows"], stream: str, shape: float
) -> Float[Tensor, " rows"]:
    """One number of Beta(shape, shape) for each id, in float64; the shape is above 1/2.

    1/2 + 1/2 sqrt(1 - U^(2 / (2 shape - 1))) cos(2 pi V) (Ulrich, 1984).
    """
    u, v = uniforms(seed, step, ids, stream, 2).unbind(1)
    radius = (1 - u ** (2 / (2 * shape - 1))).sqrt()
    return (1 + radius * (2 * math.pi * v).cos()) / 2


def _uniforms(words: Int64[Tensor, " rows"], count: int) -> Float[Tensor, "rows count"]:
    places = torch.arange(1, count + 1, device=words.device) * _STEP
    return _shifted(_mixed(words[:, None] + places), 11).double() * 2.0**-53


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _mixed(words: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """A bijection of 64-bit words in which each bit of the input moves half the bits of the output."""
    for shift, factor in _MIX:
        words = (words ^ _shifted(words, shift)) * factor
    return words


def _shifted(words: Tensor, by: int) -> Tensor:
    """Shifted right with zeros from the left."""
    return (words >> by) & ((1 << (64 - by)) - 1)
