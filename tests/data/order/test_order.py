"""The order: each sample once an epoch, batches that know no ranks, few shards at a time, and a good shuffle."""

import functools
import itertools
import operator
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order.order import Order, Picks, SourceCounts, default_lanes

counts = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any)
Visit = tuple[int, int, int, int]


class Case(NamedTuple):
    """Arguments of an order; put together in the tests, since the run-time checks of types draw random numbers."""

    seed: int
    sources: list[tuple[list[int], float]]
    shape: tuple[int, int]
    window: int

    def order(self) -> Order:
        sources = [SourceCounts(f"source {n}", *source) for n, source in enumerate(self.sources)]
        lanes, per_batch = self.shape
        return Order(self.seed, sources, lanes * per_batch, lanes=lanes, window=self.window)


cases = st.builds(
    Case,
    st.integers(0, 2**40),
    st.lists(st.tuples(counts, st.sampled_from([1.0, 2.0, 0.5, 3.7])), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (1, 7), (4, 1), (4, 3), (12, 1), (24, 2)]),
    st.sampled_from([1, 2, 8]),
)


def visits(picks: Picks) -> list[Visit]:
    return list(zip(*(part.tolist() for part in picks), strict=True))


def batch(order: Order, step: int) -> list[Visit]:
    return visits(order.picks(step, range(order.global_batch)))


@given(cases)
@settings(max_examples=15, deadline=None)
def test_each_sample_comes_once_an_epoch_of_its_lanes_line(case: Case) -> None:
    order = case.order()
    # Two epochs are complete when three are over, and every lane, however few samples it has, had its turn.
    missing = Counter({source: 3 * line.num_samples + 8 * order.lanes for source, line in enumerate(order.lines)})
    seen: Counter[Visit] = Counter()
    for step in itertools.count():
        visited = batch(order, step)
        seen.update(visited)
        missing.subtract(visit[0] for visit in visited)
        if max(missing.values()) <= 0:
            break
    assert set(seen.values()) == {1}
    for source, line in enumerate(order.lines):
        everything = {(shard, row) for shard, count in enumerate(line.counts.tolist()) for row in range(count)}
        for epoch in range(2):
            assert {(v[2], v[3]) for v in seen if v[:2] == (source, epoch)} == everything


@pytest.mark.parametrize(
    ("shards", "global_batch", "lanes"),
    [([37, 23], 12, 12), ([100], 16, 16), ([3, 1], 24, 24), ([0, 5, 0, 91, 7], 8, 4), ([13] * 40, 32, 8), ([1], 4, 2)],
)
def test_forty_epochs_lose_and_double_nothing(shards: list[int], global_batch: int, lanes: int) -> None:
    order = Order(5, [SourceCounts("a", shards)], global_batch, lanes=lanes)
    size = sum(shards)
    seen = Counter(visit for step in range(-(-41 * size // global_batch) + 1) for visit in batch(order, step))
    assert set(seen.values()) == {1}
    complete = Counter(epoch for _, epoch, _, _ in seen)
    assert all(complete[epoch] == size for epoch in range(40))


@given(cases, st.integers(0, 10**9), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_the_ranks_slots_make_up_the_global_batch(case: Case, step: int, ranks: int) -> None:
    order = case.order()
    ends = [rank * order.global_batch // ranks for rank in range(ranks + 1)]
    parts = [visits(order.picks(step, range(a, b))) for a, b in itertools.pairwise(ends)]
    assert functools.reduce(operator.add, parts) == batch(order, step)


def test_lanes_stay_within_one_sample_of_each_other() -> None:
    order = Order(0, [SourceCounts("a", [7, 50, 3, 11])], 8, lanes=8)
    for step in range(60):
        epochs = Counter(visit[1] for visit in batch(order, step))
        assert max(epochs) - min(epochs) <= 1
        turn = step + 1 - (min(epochs) + 1) * order.lines[0].num_samples / 8
        assert len(epochs) == 1 or abs(turn) <= 1  # a batch straddles two epochs only where one ends


@pytest.mark.parametrize("window", [1, 3])
def test_a_lane_reads_few_shards_at_a_time_and_says_which_come_next(window: int) -> None:
    shards = np.random.default_rng(0).integers(20, 60, 60)
    order = Order(1, [SourceCounts("a", shards)], 4, lanes=4, window=window)
    steps = int(shards.sum()) // 4
    for lane in range(4):
        slots = range(lane, lane + 1)
        read = [visits(order.picks(step, slots))[0][2] for step in range(steps)]
        last_use = {shard: step for step, shard in enumerate(read)}
        first_use: dict[int, int] = {}
        for step, shard in enumerate(read):
            first_use.setdefault(shard, step)
        open_at = [sum(first_use[s] <= step <= last_use[s] for s in first_use) for step in range(steps)]
        assert max(open_at) <= 2 * window  # one block, and where the epoch turns a second
        for step in range(0, steps - 40, 7):
            ahead = [shard for _, shard in order.shards_ahead(step, slots)]
            assert set(read[step : step + 20]) <= set(ahead)
            assert read[step] in ahead[:window]


def test_batches_depend_on_seed_and_name_and_change_with_the_epoch() -> None:
    def epoch(seed: int, name: str, start: int = 0) -> list[tuple[int, int]]:
        order = Order(seed, [SourceCounts(name, [16] * 4)], 8)
        return [visit[2:] for step in range(start, start + 8) for visit in batch(order, step)]

    assert epoch(0, "a") == epoch(0, "a")
    assert len({tuple(epoch(0, "a")), tuple(epoch(1, "a")), tuple(epoch(0, "b")), tuple(epoch(0, "a", 8))}) == 4


def test_the_order_keeps_its_values_for_ever() -> None:
    # Frozen when first written: a run resumed under a later version must go on with the same batches.
    order = Order(7, [SourceCounts("a", [5, 3, 9], 2.0), SourceCounts("b", [4, 4], 1.0)], 6)
    assert batch(order, 0) + batch(order, 41) == FROZEN


@pytest.mark.parametrize(
    ("global_batch", "lanes"), [(1, 1), (7, 7), (256, 256), (4096, 1024), (65536, 1024), (2050, 1025 // 5 * 2)]
)
def test_lanes_are_the_largest_divisor_up_to_1024(global_batch: int, lanes: int) -> None:
    assert default_lanes(global_batch) == lanes
    with pytest.raises(ValueError, match="do not divide"):
        Order(0, [SourceCounts("a", [9])], global_batch, lanes=global_batch + 1)


@pytest.mark.parametrize("shards", [[1200] * 1, [300] * 4, [60] * 20, [12] * 100])
def test_the_shuffle_mixes_batches_as_a_full_one_does(shards: list[int]) -> None:
    order = Order(3, [SourceCounts("a", shards)], 24)
    starts = np.cumsum([0, *shards])
    seen: dict[int, list[int]] = defaultdict(list)
    for step in range(50):
        picks = order.picks(step, range(24))
        seen[step] = (starts[picks.shards] + picks.rows).tolist()
    everything = np.array([position for step in range(50) for position in seen[step]])
    assert sorted(everything.tolist()) == list(range(1200))
    time = np.repeat(np.arange(50), 24)
    assert abs(np.corrcoef(time, everything)[0, 1]) < 0.2
    # Two samples of a batch lie a third of the data apart on average, as two random ones do.
    apart = np.mean([np.abs(np.subtract.outer(s, s)).sum() / (24 * 23) for s in seen.values()])
    assert abs(apart - 400) < 40


FROZEN: list[Visit] = [
    (0, 0, 2, 0),
    (1, 0, 0, 2),
    (1, 0, 0, 3),
    (0, 0, 2, 4),
    (0, 0, 2, 7),
    (0, 0, 0, 2),
    (0, 10, 0, 3),
    (0, 9, 2, 6),
    (0, 8, 2, 1),
    (0, 10, 2, 8),
    (1, 9, 1, 1),
    (1, 9, 0, 1),
]
