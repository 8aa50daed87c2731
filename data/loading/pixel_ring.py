"""Memory for batches of pixels that loading processes write and the training process reads, used again and again.

Fresh memory costs a page fault for every 4 KiB, a tenth of all the work on a sample; these pages stay mapped.
"""

import mmap
import weakref
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

_FREE, _TAKEN = 0, 1


class Slot(NamedTuple):
    """A batch in the ring, on its way from a worker."""

    number: int


class PixelRing:
    """`slots` batches of `rows` images for each of `workers` processes; made before they are forked.

    A worker takes a free slot of its own; the training process reads it in place, and gives it back when the last
    tensor on it is gone. So a batch that is kept stays as it is, and a worker that finds no free slot goes without.
    """

    def __init__(self, workers: int, slots: int, rows: int, size: int) -> None:
        self._slots = slots
        self._shape = (rows, size, size, 3)
        self._bytes = rows * size * size * 3
        self._memory = mmap.mmap(-1, workers * slots * self._bytes)
        self._states = mmap.mmap(-1, workers * slots)

    @staticmethod
    def ahead(workers: int, prefetch: int, rows: int, size: int) -> "PixelRing":
        """Room for what each of `workers` processes (0: this one) holds ready, a batch in use, and one just let go."""
        return PixelRing(max(1, workers), prefetch + 2, rows, size)

    def take(self, worker: int) -> tuple[Slot, NDArray[np.uint8]] | None:
        """A free slot of this worker with its memory [rows, size, size, 3]; None when there is none."""
        for number in range(worker * self._slots, (worker + 1) * self._slots):
            if self._states[number] == _FREE:
                self._states[number] = _TAKEN
                return Slot(number), self._array(number)
        return None

    def room(self, worker: int) -> tuple[Slot | UInt8[Tensor, "batch 3 size size"], NDArray[np.uint8]]:
        """The handle to send, and the memory [rows, 3, size, size] to write to: a slot's, or fresh where none is free.

        Channels lie innermost in memory, as decoders write them: no pixel is moved twice.
        """
        free_slot = self.take(worker)
        if free_slot is not None:
            slot, pixels = free_slot
            return slot, pixels.transpose(0, 3, 1, 2)
        images = torch.empty(self._shape, dtype=torch.uint8).permute(0, 3, 1, 2)
        return images, images.numpy()

    def images(self, sent: Slot | UInt8[Tensor, "batch 3 size size"]) -> UInt8[Tensor, "batch 3 size size"]:
        """The batch that was sent, in the training process; what is in a slot is not copied."""
        if isinstance(sent, torch.Tensor):
            return sent
        array = self._array(sent.number)
        weakref.finalize(array, self._free, sent.number)
        # The tensor keeps this array, and no other name does.
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    def _array(self, number: int) -> NDArray[np.uint8]:
        offset = number * self._bytes
        flat = np.frombuffer(self._memory, dtype=np.uint8, count=self._bytes, offset=offset)
        return np.ndarray(self._shape, dtype=np.uint8, buffer=flat.data)

    def _free(self, number: int) -> None:
        self._states[number] = _FREE
