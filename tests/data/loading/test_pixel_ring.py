"""The ring: pixels arrive without a copy, and nothing is written over while anybody holds it."""

import gc
from pathlib import Path

import numpy as np
import pytest

from data.loading.pixel_ring import PixelRing
from tests.data.loading.test_stream import assert_same, stream
from tests.data.small_shards import write_source


def test_a_batch_is_read_where_it_was_written() -> None:
    ring = PixelRing(workers=2, slots=1, rows=3, size=4)
    taken = ring.take(1)
    assert taken is not None
    slot, memory = taken
    memory[:] = np.arange(memory.size, dtype=np.uint8).reshape(memory.shape)
    images = ring.images(slot)
    assert images.shape == (3, 3, 4, 4)
    assert np.array_equal(images.numpy(), memory.transpose(0, 3, 1, 2))
    memory[1] = 9
    assert (images[1] == 9).all()


def test_a_slot_is_free_when_the_last_view_of_it_is_gone() -> None:
    ring = PixelRing(workers=1, slots=1, rows=2, size=4)
    taken = ring.take(0)
    assert taken is not None
    images = ring.images(taken[0])
    assert ring.take(0) is None
    row, array = images[1:], images.numpy()
    del images, row
    assert ring.take(0) is None
    del array
    gc.collect()
    assert ring.take(0) is not None


def test_a_worker_takes_slots_of_its_own_only() -> None:
    ring = PixelRing(workers=2, slots=2, rows=1, size=2)
    numbers = [taken[0].number for worker in (0, 0, 1, 1) if (taken := ring.take(worker)) is not None]
    assert numbers == [0, 1, 2, 3]
    assert ring.take(0) is None


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_that_are_kept_stay_as_they_are(tmp_path: Path, workers: int) -> None:
    pattern = write_source(tmp_path, [23, 14])
    alone = list(stream(pattern).batches(0, 30))
    kept = []
    for number, batch in enumerate(stream(pattern, workers=workers, prefetch=1).batches(0, 30)):
        # Some are let go, so that their memory is used again, and some are kept.
        kept.append(batch if number % 3 else None)
    assert_same([batch for batch in kept if batch], [b for number, b in enumerate(alone) if number % 3])
