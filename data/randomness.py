"""Random numbers that depend on names, never on history: the same in any worker of any rank, now or on resume."""

import hashlib
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_ALL_BITS = 0xFFFFFFFFFFFFFFFF
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def hash_key(*values: int | str) -> bytes:
    """32 bytes that name `values`; distinct tuples give distinct inputs to the hash."""
    text = "\x1f".join(f"{type(value).__name__}:{len(str(value))}:{value}" for value in values)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).digest()


class Draws:
    """A counter-based stream of uniform numbers named by its key, such as ("crop", seed, epoch, sample id).

    The n-th number is a hash of (key, n), so it does not change with library versions, processes or other streams.
    """

    def __init__(self, *key: int | str) -> None:
        self._key = hash_key(*key)
        self._counter = 0
        self._ready: tuple[int, ...] = ()

    def _next(self) -> int:
        if not self._ready:
            digest = hashlib.blake2b(self._counter.to_bytes(8, "little"), key=self._key, digest_size=64).digest()
            self._ready = struct.unpack("<8Q", digest)
            self._counter += 1
        value, self._ready = self._ready[0], self._ready[1:]
        return value

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * ((self._next() >> 11) * 2.0**-53)

    def integer(self, count: int) -> int:
        """One of 0 .. count - 1; the bias of the modulus is below count / 2**64."""
        return self._next() % count

    def weighted(self, fractions: Mapping[str, float]) -> str:
        """One of the names, each with its share; the shares sum to one."""
        place = self.uniform()
        for name, fraction in fractions.items():
            place -= fraction
            if place < 0:
                return name
        return list(fractions)[-1]


class Permutation:
    """A keyed shuffle of 0 .. count - 1 that is computed at any position in O(1) time and memory."""

    def __init__(self, count: int, *key: int | str) -> None:
        self.count = count
        self._key = key_number(*key)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shuffled values at `positions`, each in 0 .. count - 1."""
        shape = positions.shape
        return permute(positions, np.full(shape, self.count), np.full(shape, self._key, dtype=np.uint64))


def key_number(*values: int | str) -> np.uint64:
    """64 bits that name `values`, to key `permute` and `scramble`."""
    return np.uint64(int.from_bytes(hash_key(*values)[:8], "little"))


def permute(positions: NDArray[np.int64], counts: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each element, the value at its position of the shuffle of 0 .. count - 1 that its key names.

    A Feistel network on Z_a x Z_b with a * b >= count, whose few surplus values walk on along their cycle
    (Bellare, Ristenpart, Rogaway, Stegers, "Format-Preserving Encryption", 2009).
    """
    limits = counts.astype(np.uint64)
    left = np.sqrt(np.maximum(counts - 1, 0)).astype(np.uint64) + np.uint64(1)
    right = (limits + left - np.uint64(1)) // left
    values = _cycle(positions.astype(np.uint64), left, right, keys)
    while len(outside := np.flatnonzero(values >= limits)):
        values[outside] = _cycle(values[outside], left[outside], right[outside], keys[outside])
    return values.astype(np.int64)


def _cycle(
    values: NDArray[np.uint64], a: NDArray[np.uint64], b: NDArray[np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = np.divmod(values, b)
    for number in range(_ROUNDS):
        key = scramble(keys, number)
        if number % 2 == 0:
            left = (left + scramble(right ^ key) % a) % a
        else:
            right = (right + scramble(left ^ key) % b) % b
    return left * b + right


def scramble(values: NDArray[np.uint64], number: int = 0) -> NDArray[np.uint64]:
    """A bijection of 64-bit numbers without pattern, one for each `number`: splitmix64 (Steele, Lea, Flood, 2014)."""
    mixed = values + np.uint64((number + 1) * _GOLDEN & _ALL_BITS)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
    return mixed ^ (mixed >> np.uint64(31))
