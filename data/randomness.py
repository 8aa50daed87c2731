"""Random numbers that depend on names, never on history: the same in any worker of any rank, now or on resume."""

import hashlib
import math
import struct

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def hash_key(*parts: int | str) -> bytes:
    """32 bytes that name `parts`; distinct tuples give distinct inputs to the hash."""
    text = "\x1f".join(f"{type(part).__name__}:{len(str(part))}:{part}" for part in parts)
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


class Permutation:
    """A keyed shuffle of 0 .. count - 1 that is computed at any position in O(1) time and memory.

    A Feistel network on Z_a x Z_b with a * b >= count, whose few surplus values walk on along their cycle
    (Bellare, Ristenpart, Rogaway, Stegers, "Format-Preserving Encryption", 2009).
    """

    def __init__(self, count: int, *key: int | str) -> None:
        self.count = count
        left = math.isqrt(max(count - 1, 0)) + 1
        self._left = np.uint64(left)
        self._right = np.uint64(-(-count // left))
        digest = hashlib.blake2b(hash_key(*key), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shuffled values at `positions`, each in 0 .. count - 1."""
        values = self._cycle(positions.astype(np.uint64))
        while (outside := values >= np.uint64(self.count)).any():
            values[outside] = self._cycle(values[outside])
        return values.astype(np.int64)

    def _cycle(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values // self._right, values % self._right
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                left = (left + _scramble(right, key) % self._left) % self._left
            else:
                right = (right + _scramble(left, key) % self._right) % self._right
        return left * self._right + right


def _scramble(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood, 2014), after adding `key`."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
    return mixed ^ (mixed >> np.uint64(31))
