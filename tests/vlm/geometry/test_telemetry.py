"""The rows that are looked at are the same on any number of ranks, and others each time."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from tests.ranks import run_ranks
from tests.vlm.objectives.geometry_definitions import fixture
from tests.vlm.objectives.parity import UNEVEN
from vlm.distributed.world import World
from vlm.geometry.names import FIGURES, HARDEST_SCORES, POSITIVE_SCORES
from vlm.geometry.telemetry import PairSample, observe, sample_pairs
from vlm.similarity.exchange import Exchange

ROWS = sum(UNEVEN[3])


def whole(with_labels: bool = True) -> PairSample:
    """Rows that tell their place: image i is (i, 0), text i (0, i)."""
    places = torch.arange(ROWS, dtype=torch.float32)
    zeros = torch.zeros(ROWS)
    labels = torch.arange(ROWS) % 4 if with_labels else None
    return PairSample(torch.stack([places, zeros], 1), torch.stack([zeros, places], 1), labels)


def sampled(size: int, step: int) -> PairSample:
    """The sample that a rank gets from its uneven number of rows."""
    world, everything = World.current(), whole()
    start = sum(UNEVEN[world.size][: world.rank])
    rows = slice(start, start + UNEVEN[world.size][world.rank])
    assert everything.labels is not None
    own = PairSample(everything.image[rows], everything.text[rows], everything.labels[rows])
    ranks, _ = Exchange(world).count(len(own.image))
    return sample_pairs(own, ranks, size, step)


@pytest.mark.parametrize("size", [3, 5, 11, 50])
def test_ranks_find_the_same_distinct_pairs_as_one_process(size: int) -> None:
    alone = sampled(size, 4)
    places = alone.image[:, 0].long()
    assert places.unique().tolist() == places.tolist()
    assert len(places) == min(size, ROWS)
    assert torch.equal(alone.text[:, 1].long(), places)
    assert alone.labels is not None
    assert torch.equal(alone.labels, places % 4)
    for found in run_ranks(sampled, 3, size, 4):
        assert torch.equal(found.image, alone.image)
        assert torch.equal(found.text, alone.text)
        assert torch.equal(found.labels, alone.labels)


def test_every_place_has_its_turn() -> None:
    seen = {int(place) for step in range(ROWS) for place in sampled(2, step).image[:, 0]}
    assert seen == set(range(ROWS))


def test_what_is_seen_of_the_fixture() -> None:
    image, text = fixture()
    seen = observe(PairSample(image, text, torch.tensor([1, 1])), 5.0)
    assert {name for name, value in seen.items() if not isinstance(value, list)} <= set(FIGURES)
    assert seen["alignment"] == pytest.approx(0.4)
    assert [seen[f"uniformity_{part}"] for part in ("image", "text", "cross")] == pytest.approx([-4, -0.16, -1.6])
    assert seen["centroid_gap"] == pytest.approx(0.2 * math.sqrt(2))
    assert seen["tolerance_image"] == pytest.approx(0.0)
    assert seen["tolerance_text"] == pytest.approx(0.96)
    assert seen["effective_rank_image"] == pytest.approx(1.0)
    assert seen["hardest_negative_weight"] == 1.0
    assert "separability" not in seen  # of two pairs none can be held out
    for name, cosine in ((POSITIVE_SCORES, 0.8), (HARDEST_SCORES, 0.6)):
        counts = seen[name]
        assert isinstance(counts, list)
        assert sum(counts) == 2
        assert counts[int((cosine + 1) * 20 + 0.5)] == 2 or counts[int((cosine + 1) * 20 - 0.5)] == 2


def test_one_cloud_twice_has_no_gap() -> None:
    rows = normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    seen = observe(PairSample(rows, rows), 20.0)
    assert seen["alignment"] == 0
    assert seen["centroid_gap"] == 0
    assert seen["distribution_gap"] == pytest.approx(0, abs=1e-3)
    assert not {name for name in seen if name.startswith("tolerance")}
