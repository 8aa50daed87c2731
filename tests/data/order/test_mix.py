"""The mix of sources: exact in every window, even in every batch, and counted in closed form."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order.mix import WINDOW_BATCHES, Mix, apportion, floor_sum, make_mix
from vlm.errors import UserError

weights = st.lists(st.sampled_from([1.0, 2.0, 0.5, 0.1, 0.25, 3.7, 12.0]), min_size=1, max_size=5)
# (lanes, places of a lane in a batch)
shapes = st.sampled_from([(1, 1), (1, 7), (4, 1), (4, 3), (6, 2), (12, 1), (8, 5)])


def mix_of(shares: list[float], shape: tuple[int, int]) -> Mix:
    lanes, per_batch = shape
    return make_mix({f"source {n}": share for n, share in enumerate(shares)}, lanes * per_batch, lanes)


def sources_of(mix: Mix, batches: range) -> np.ndarray:
    """The source of every place: [lane, place]."""
    places = np.arange(batches.start * mix.per_batch, batches.stop * mix.per_batch)
    grid = np.meshgrid(np.arange(mix.lanes), places, indexing="ij")
    return mix.sources(grid[0].ravel(), grid[1].ravel()).reshape(mix.lanes, -1)


@given(weights, shapes, st.integers(0, 3000))
@settings(max_examples=25, deadline=None)
def test_any_window_of_1000_batches_has_the_exact_shares(
    shares: list[float], shape: tuple[int, int], start: int
) -> None:
    mix = mix_of(shares, shape)
    found = Counter(sources_of(mix, range(start, start + WINDOW_BATCHES)).ravel().tolist())
    total = WINDOW_BATCHES * shape[0] * shape[1]
    exact = [Fraction(repr(share)) for share in shares]
    for source, share in enumerate(exact):
        assert abs(found[source] - share / sum(exact) * total) < 1


@given(weights, shapes)
@settings(max_examples=25, deadline=None)
def test_numbers_count_what_came_before_in_the_lane(shares: list[float], shape: tuple[int, int]) -> None:
    mix = mix_of(shares, shape)
    sources = sources_of(mix, range(40))
    for lane, row in enumerate(sources):
        numbers = mix.numbers(row, np.full_like(row, lane), np.arange(len(row)))
        assert numbers.tolist() == [row[:place].tolist().count(source) for place, source in enumerate(row.tolist())]


def test_numbers_go_on_over_many_windows() -> None:
    mix = mix_of([0.5, 0.3, 0.2], (4, 3))
    window = mix.period // mix.lanes * mix.lanes  # a lane comes round once it has seen every lane's part
    lanes = np.arange(4)
    for source, count in enumerate(mix.counts):
        later = mix.numbers(np.full(4, source), lanes, np.full(4, 10**6 * window + 17))
        first = mix.numbers(np.full(4, source), lanes, np.full(4, 17))
        assert (later - first == 10**6 * count).all()


@pytest.mark.parametrize("shares", [[1.0, 1.0], [0.5, 0.3, 0.2], [3.0, 1.0, 1.0, 0.01], [1.0] * 7])
@pytest.mark.parametrize("shape", [(8, 1), (256, 1), (4, 3), (7, 1), (64, 8), (1, 512)])
def test_every_batch_and_every_lane_has_nearly_the_shares(shares: list[float], shape: tuple[int, int]) -> None:
    mix = mix_of(shares, shape)
    sources = sources_of(mix, range(200))
    share = np.asarray(mix.counts) / mix.period
    for source in range(len(shares)):
        mine = sources == source
        in_batch = mine.reshape(mix.lanes, 200, mix.per_batch).sum((0, 2))
        assert np.abs(in_batch - share[source] * mix.lanes * mix.per_batch).max() < 3
        in_lane = mine.cumsum(1) - share[source] * np.arange(1, mine.shape[1] + 1)
        assert np.abs(in_lane).max() < 5


@given(
    st.integers(1, 300).flatmap(lambda m: st.tuples(st.just(m), st.integers(0, m - 1))),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 400)), min_size=1, max_size=5),
)
def test_floor_sums_are_the_sums_of_floors(line: tuple[int, int], pairs: list[tuple[int, int]]) -> None:
    modulus, slope = line
    counts, offsets = (np.array(part) for part in zip(*pairs, strict=True))
    expected = [sum((slope * x + offset) // modulus for x in range(count)) for count, offset in pairs]
    assert floor_sum(counts, modulus, slope, offsets).tolist() == expected


def test_floor_sums_stay_exact_at_the_largest_batch() -> None:
    modulus = 2_000_000_000
    slope = 1_236_067_977
    count, offset = 1_999_999_999, 1_234_567_890
    total = floor_sum(np.array([count]), modulus, slope, np.array([offset]))[0]

    def exact(n: int, m: int, a: int, b: int) -> int:
        return 0 if n == 0 else n * (n - 1) // 2 * (a // m) + n * (b // m) + _rest(n, m, a % m, b % m)

    def _rest(n: int, m: int, a: int, b: int) -> int:
        last = a * n + b
        return 0 if last < m else exact(last // m, a, m, last % m)

    assert total == exact(count, modulus, slope, offset)


@given(st.lists(st.fractions(Fraction(1, 1000), 50), min_size=1, max_size=6), st.integers(0, 5000))
def test_apportioned_seats_are_within_one_of_the_shares(shares: list[Fraction], seats: int) -> None:
    whole = apportion(shares, seats)
    assert sum(whole) == seats
    assert all(abs(n - share * seats / sum(shares)) < 1 for n, share in zip(whole, shares, strict=True))


def test_a_weight_that_never_comes_and_a_batch_that_is_too_large_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^data\.sources\.rare: its weight 1e-05 is less than one sample in 1,000 batches"
    ):
        make_mix({"common": 1.0, "rare": 1e-5}, 8, 8)
    with pytest.raises(UserError, match=r"^global_batch: 4,000,000 is more than"):
        make_mix({"a": 1.0}, 4_000_000, 1000)
