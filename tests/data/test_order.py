"""The order: each sample once an epoch, exact shares, and global batches that know no ranks."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import MAX_PERIOD, Line, Order, Picks, periodic_pattern, whole_shares
from vlm.errors import UserError

weights = st.sampled_from([1.0, 2.0, 0.5, 0.1, 0.25, 3.7, 12.0])
lines = st.lists(st.tuples(st.integers(1, 60), weights), min_size=1, max_size=5).map(
    lambda pairs: [Line(f"source {place}", count, weight) for place, (count, weight) in enumerate(pairs)]
)


def as_list(picks: Picks) -> list[tuple[int, int, int]]:
    return list(zip(*(part.tolist() for part in picks), strict=True))


def prefix(order: Order, length: int) -> list[tuple[int, int, int]]:
    return as_list(order.picks(0, length, range(length)))


@given(lines, st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_each_sample_comes_once_an_epoch_of_its_source(sources: list[Line], seed: int) -> None:
    seen = prefix(Order(seed, sources), 1500)
    for place, line in enumerate(sources):
        mine = [(epoch, sample) for source, epoch, sample in seen if source == place]
        assert [epoch for epoch, _ in mine] == [n // line.num_samples for n in range(len(mine))]
        for epoch in range(len(mine) // line.num_samples):
            assert sorted(sample for e, sample in mine if e == epoch) == list(range(line.num_samples))
        assert len(set(mine)) == len(mine)


@given(lines, st.integers(0, 99), st.integers(4, 40), st.integers(0, 10**9), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_ranks_rows_make_up_the_global_batch(
    sources: list[Line], seed: int, global_batch: int, step: int, world_size: int
) -> None:
    order = Order(seed, sources)
    whole = as_list(order.picks(step, global_batch, range(global_batch)))
    ends = [rank * global_batch // world_size for rank in range(world_size + 1)]
    parts = [as_list(order.picks(step, global_batch, range(*ends[rank : rank + 2]))) for rank in range(world_size)]
    assert [pick for part in parts for pick in part] == whole
    # and one global batch twice as large is two of these
    assert as_list(order.picks(step, 2 * global_batch, range(global_batch))) == as_list(
        order.picks(2 * step, global_batch, range(global_batch))
    )


@given(st.lists(weights, min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_shares_are_exact_to_one_sample_over_any_prefix(values: list[float], data: st.DataObject) -> None:
    order = Order(0, [Line(str(place), 10, weight) for place, weight in enumerate(values)])
    total = sum(Fraction(repr(weight)) for weight in values)
    sources = order.picks(0, 400, range(400)).sources
    for place, weight in enumerate(values):
        share = Fraction(repr(weight)) / total
        for length, count in enumerate(np.cumsum(sources == place).tolist(), start=1):
            assert abs(count - length * share) < 1
    far = data.draw(st.integers(0, 10**12))  # a window far out: the difference of two prefixes
    window = Counter(order.picks(far, 1000, range(1000)).sources.tolist())
    for place, weight in enumerate(values):
        assert abs(window[place] - 1000 * Fraction(repr(weight)) / total) < 2


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_a_period_holds_each_source_as_often_as_its_share(shares: list[int]) -> None:
    assert Counter(periodic_pattern(shares).tolist()) == dict(enumerate(shares))


def test_whole_shares_are_the_smallest_in_the_ratio() -> None:
    assert whole_shares({"a": 0.7, "b": 0.3}) == [7, 3]
    assert whole_shares({"a": 2.0, "b": 4.0, "c": 6.0}) == [1, 2, 3]
    assert whole_shares({"only": 0.123456789}) == [1]


def test_weights_too_fine_for_a_pattern_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"data\.sources: the weights \(a 0\.1234567, b 1\.0\).*fewer digits"):
        whole_shares({"a": 0.1234567, "b": 1.0})
    assert sum(whole_shares({"a": 0.333333, "b": 0.666667})) == MAX_PERIOD


def test_seeds_epochs_and_sources_are_shuffled_differently() -> None:
    def line(seed: int, name: str = "a", epoch: int = 0) -> list[int]:
        return Order(seed, [Line(name, 100)]).picks(epoch, 100, range(100)).samples.tolist()

    shuffles = [line(0), line(1), line(0, "b"), line(0, epoch=1)]
    assert len({tuple(shuffle) for shuffle in shuffles}) == 4
    # Two independent shuffles agree in one place on average: Poisson(1), so 8 or more is a one in 10^5 event.
    assert all(np.equal(a, b).sum() < 8 for a in shuffles for b in shuffles if a is not b)


def test_another_source_changes_no_shuffle_of_the_first() -> None:
    alone = Order(3, [Line("a", 50)]).picks(0, 50, range(50)).samples.tolist()
    mixed = Order(3, [Line("a", 50), Line("b", 9)]).picks(0, 100, range(100))
    assert mixed.samples[mixed.sources == 0].tolist() == alone


def test_a_far_step_costs_as_little_as_the_first() -> None:
    picks = Order(0, [Line("a", 10**9), Line("b", 10**8, 3.0)]).picks(10**9, 32_768, range(64))
    assert len(picks.samples) == 64
    assert picks.epochs.max() > 1000
