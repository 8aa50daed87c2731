"""Batches of neighbours: one cluster or whole groups each, at most once an epoch, and a function of the step alone."""

import itertools
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from data.loading.substitution import substitutes
from data.order.mix import make_mix
from data.order.neighbours import NeighbourLine, Neighbours
from data.order.order import Order, Picks, SourceCounts

COUNTS = [40, 0, 31, 29]
SIZES = [37, 5, 28, 22, 0, 6]  # of clusters; two samples have none
BATCH = 6


def labels_of(sizes: list[int], count: int, seed: int = 0) -> NDArray[np.int32]:
    labels = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(count - sum(sizes), -1)])
    return np.random.default_rng(seed).permutation(labels).astype(np.int32)


CLUSTERS = labels_of(SIZES, sum(COUNTS))


def clustered(clusters: NDArray[np.int32] = CLUSTERS, batch: int = BATCH, seed: int = 3) -> Order:
    return Order(seed, [SourceCounts("a", COUNTS, neighbours=Neighbours(clusters))], batch)


def grouped(size: int = 3, batch: int = BATCH) -> tuple[Order, NDArray[np.int32]]:
    """19 full groups, then one of 2 members, over the samples of 3 clusters in the order of their groups."""
    full = np.repeat(np.arange(20), size)[: 19 * size + 2]
    groups = labels_of(np.bincount(full).tolist(), sum(COUNTS), seed=1)
    clusters = np.where(groups < 0, -1, groups // 7).astype(np.int32)
    neighbours = Neighbours(groups, size, clusters)
    return Order(3, [SourceCounts("a", COUNTS, neighbours=neighbours)], batch), groups


def samples(picks: Picks) -> list[int]:
    """The samples numbered through the shards, by a loop."""
    pairs = zip(picks.shards.tolist(), picks.rows.tolist(), strict=True)
    return [sum(COUNTS[:shard]) + row for shard, row in pairs]


def batch(order: Order, step: int) -> list[int]:
    return samples(order.picks(step, range(order.global_batch)))


def test_a_batch_is_of_one_cluster_and_an_epoch_has_its_blocks() -> None:
    order = clustered()
    blocks = [size // BATCH for size in SIZES]
    left_out = []
    for epoch in range(4):
        steps = range(epoch * sum(blocks), (epoch + 1) * sum(blocks))
        batches = [batch(order, step) for step in steps]
        assert all(len({int(CLUSTERS[sample]) for sample in one}) == 1 for one in batches)
        assert Counter(int(CLUSTERS[one[0]]) for one in batches) == Counter(
            {cluster: number for cluster, number in enumerate(blocks) if number}
        )
        seen = Counter(sample for one in batches for sample in one)
        assert set(seen.values()) == {1}
        left_out.append({sample for sample in range(sum(COUNTS)) if sample not in seen and CLUSTERS[sample] == 3})
        assert all(set(order.picks(step, range(BATCH)).epochs.tolist()) == {epoch} for step in steps)
    assert [len(one) for one in left_out] == [4] * 4  # of 22
    assert len({frozenset(one) for one in left_out}) > 1


def test_an_epoch_does_not_go_through_one_cluster_after_another() -> None:
    order = clustered()
    runs = [[int(CLUSTERS[batch(order, step)[0]]) for step in range(14 * epoch, 14 * epoch + 14)] for epoch in range(6)]
    assert len({tuple(one) for one in runs}) > 1
    assert any(sum(a != b for a, b in itertools.pairwise(one)) > 4 for one in runs)


def test_one_cluster_of_all_is_the_ordinary_order_in_distribution() -> None:
    """Each epoch is a shuffle of all samples; over many, each comes as often, with all others alike."""
    order = clustered(np.zeros(100, np.int32), 10)
    seen, together = np.zeros(100), np.zeros((100, 100))
    for epoch in range(200):
        in_epoch = []
        for step in range(epoch * 10, epoch * 10 + 10):
            one = batch(order, step)
            in_epoch += one
            together[np.ix_(one, one)] += 1
        assert sorted(in_epoch) == list(range(100))
        seen[in_epoch[:10]] += 1
    assert abs(seen - 20).max() < 5 * (20 * 0.9) ** 0.5
    others = together[~np.eye(100, dtype=bool)]
    assert abs(others - 200 * 9 / 99).max() < 6 * (200 * 9 / 99) ** 0.5


def test_any_slots_of_any_step_are_found_alone() -> None:
    order = clustered()
    for step in (0, 7, 10**7):
        whole = batch(order, step)
        assert [samples(clustered().picks(step, range(slot, slot + 1)))[0] for slot in range(BATCH)] == whole
        assert samples(clustered().picks(step, range(2, 6, 3))) == whole[2:6:3]
        assert batch(clustered(seed=4), step) != whole


def test_groups_stay_together_each_once_an_epoch() -> None:
    order, groups = grouped()
    for epoch in range(3):
        batches = [batch(order, step) for step in range(9 * epoch, 9 * epoch + 9)]  # of 19 full groups, two each
        for one in batches:
            assert set(Counter(groups[one].tolist()).values()) == {3}
        seen = Counter(sample for one in batches for sample in one)
        assert set(seen.values()) == {1}
        assert len(seen) == 54
    ever = {sample for step in range(90) for sample in batch(order, step)}
    assert ever == set(np.flatnonzero((groups >= 0) & (groups < 19)).tolist())  # not the group of two


def test_in_a_mix_the_slots_of_a_source_are_of_one_cluster_and_the_others_as_without() -> None:
    sources = [SourceCounts("b", [11, 9], 2.0), SourceCounts("a", COUNTS, 1.0, Neighbours(CLUSTERS))]
    mixed = Order(3, sources, 8)
    plain = Order(3, [sources[0], SourceCounts("a", COUNTS, 1.0)], 8)
    most = 0
    epochs: dict[int, Counter[int]] = {}
    for step in range(300):
        picks, others = mixed.picks(step, range(8)), plain.picks(step, range(8))
        near = picks.sources == 1
        np.testing.assert_array_equal(picks.sources, others.sources)
        for mine, theirs in zip(picks, others, strict=True):
            np.testing.assert_array_equal(mine[~near], theirs[~near])
        found = samples(Picks(*(part[near] for part in picks)))
        assert len({int(CLUSTERS[sample]) for sample in found}) <= 1
        assert len(set(found)) == len(found)
        most = max(most, len(found))
        for epoch, sample in zip(picks.epochs[near].tolist(), found, strict=True):
            epochs.setdefault(epoch, Counter())[sample] += 1
        halves = [mixed.picks(step, range(3)), mixed.picks(step, range(3, 8))]
        for part, *pieces in zip(picks, *halves, strict=True):
            np.testing.assert_array_equal(part, np.concatenate(pieces))
    assert all(set(seen.values()) == {1} for seen in epochs.values())
    assert len(epochs) > 2
    line = mixed.lines[1]
    assert isinstance(line, NeighbourLine)
    assert line.batch == mixed.mix.most_in_a_batch(1) == most


@pytest.mark.parametrize(("weights", "batch_size", "lanes"), [((1, 2, 3), 12, 12), ((1, 9), 8, 2), ((0.3, 5), 6, 1)])
def test_the_most_slots_of_a_source_are_those_of_the_fullest_of_all_batches(
    weights: tuple[float, ...], batch_size: int, lanes: int
) -> None:
    mix = make_mix({str(number): weight for number, weight in enumerate(weights)}, batch_size, lanes)
    slots = np.arange(batch_size)
    of = [mix.sources(slots // mix.per_batch, step * mix.per_batch + slots % mix.per_batch) for step in range(1000)]
    for source in range(len(weights)):
        assert mix.most_in_a_batch(source) == max(int((one == source).sum()) for one in of)


def test_a_substitute_is_of_the_same_cluster_and_not_of_the_batch() -> None:
    order = clustered()
    for step in (0, 5, 11):
        planned = batch(order, step)
        found = [sum(COUNTS[:shard]) + row for shard, row in substitutes(order, 3, step, 2)]
        cluster = CLUSTERS[planned[2]]
        near = [sample for sample in found[:10] if CLUSTERS[sample] == cluster]
        assert near == found[:10]
        assert not set(found[:-5]) & set(planned)
        assert set(found[-5:]) == set(planned) - {planned[2]}
        assert all(CLUSTERS[sample] >= 0 for sample in found)


def test_a_substitute_in_batches_of_groups_is_of_the_groups_cluster() -> None:
    order, groups = grouped()
    planned = batch(order, 4)
    found = [sum(COUNTS[:shard]) + row for shard, row in substitutes(order, 3, 4, 0)]
    assert {int(groups[sample]) // 7 for sample in found[:8]} == {int(groups[planned[0]]) // 7}


def test_shards_ahead_are_those_of_the_next_batches() -> None:
    order = clustered()
    ahead = order.shards_ahead(5, range(2, 4), blocks=1)
    needed = {int(shard) for step in range(5, 13) for shard in order.picks(step, range(2, 4)).shards}
    assert {shard for _, shard in ahead} == needed
