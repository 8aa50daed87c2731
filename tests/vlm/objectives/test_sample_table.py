"""A table of samples: exact by id, whoever holds them, and the same after a change of ranks."""

import torch
from torch import Tensor

from tests.ranks import run_ranks
from vlm.distributed.world import World
from vlm.objectives.sample_table import SampleTable
from vlm.objectives.state import RunFacts

DEFAULTS = {"score": -1.0, "level": float("-inf")}
HUGE = 2**62 + 1
# What two batches say, in the order of all rows; ids of any size and sign, 3 and HUGE twice in the first batch.
BATCHES: tuple[tuple[int, ...], ...] = ((3, HUGE, 3, -8, 4, 5, HUGE, 6), (5, 9, -8, 10, HUGE, 3, 11, 12))
COUNTS = {1: (8,), 2: (7, 1), 3: (1, 5, 2)}


def facts(world: World | None = None) -> RunFacts:
    return RunFacts(2, 0, 10, 5, 0, world or World())


def told(batch: int) -> Tensor:
    """The score that each row of a batch proposes."""
    return torch.arange(8, dtype=torch.float64) + 100 * (batch + 1)


def by_hand(batches: int) -> dict[int, float]:
    """The values that a plain dictionary holds after the first batches: of a sample that came twice, the first."""
    found: dict[int, float] = {}
    for number in range(batches):
        new: dict[int, float] = {}
        for row, sample in enumerate(BATCHES[number]):
            new.setdefault(sample, float(told(number)[row]))
        found.update(new)
    return found


def follow(pieces: list[dict[str, Tensor]], first: int, last: int) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Batches `first` to `last` on this rank; the scores it read, and what it holds in the end."""
    world = World.current()
    table = SampleTable(facts(world), DEFAULTS)
    table.restore({}, pieces)
    start = sum(COUNTS[world.size][: world.rank])
    rows = slice(start, start + COUNTS[world.size][world.rank])
    read = []
    for number in range(first, last):
        values = table.read(torch.tensor(BATCHES[number])[rows])
        read.append(values["score"].tolist())
        table.propose({"score": told(number)[rows], "level": torch.zeros(len(values["level"]))})
        table.commit()
    assert all(sample % world.size == world.rank for sample in table.local()["ids"].tolist())
    return read, table.local()


def everything(pieces: list[dict[str, Tensor]]) -> dict[int, float]:
    return {
        sample: score
        for piece in pieces
        for sample, score in zip(piece["ids"].tolist(), piece["score"].tolist(), strict=True)
    }


def run(
    size: int, pieces: list[dict[str, Tensor]], first: int, last: int
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """The scores that the first of these batches read, over all ranks, and what ranks hold after the last."""
    results = [follow(pieces, first, last)] if size == 1 else run_ranks(follow, size, pieces, first, last)
    scores = [score for read, _ in results for score in (read[0] if read else [])]
    return scores, [local for _, local in results]


def test_moving_from_three_ranks_to_two_to_one_and_back_loses_nothing() -> None:
    scores, pieces = run(3, [], 0, 1)
    assert scores == [DEFAULTS["score"]] * 8
    assert everything(pieces) == by_hand(1)
    scores, pieces = run(2, pieces, 1, 2)
    assert scores == [by_hand(1).get(sample, DEFAULTS["score"]) for sample in BATCHES[1]]
    assert everything(pieces) == by_hand(2)
    for size in (1, 3):
        _, pieces = run(size, pieces, 2, 2)
        assert everything(pieces) == by_hand(2)
        assert len(pieces) == size


def test_nothing_lasts_before_its_commit_and_nothing_is_committed_twice() -> None:
    table = SampleTable(facts(), DEFAULTS)
    ids = torch.tensor([1, 2])
    table.read(ids)
    table.propose({"score": torch.tensor([5.0, 6.0]), "level": torch.zeros(2)})
    assert table.read(ids)["score"].tolist() == [-1.0, -1.0]
    table.commit()  # the second reading proposed nothing
    assert len(table) == 0
    table.read(ids)
    table.propose({"score": torch.tensor([5.0, 6.0]), "level": torch.zeros(2)})
    table.commit()
    table.commit()
    assert table.read(torch.tensor([2, 3]))["score"].tolist() == [6.0, -1.0]
    assert table.read(torch.tensor([2, 3]))["level"].tolist() == [0.0, -float("inf")]


def test_a_column_that_was_not_saved_starts_at_its_default() -> None:
    table = SampleTable(facts(), DEFAULTS)
    table.restore({}, [{"ids": torch.tensor([4]), "level": torch.tensor([2.0], dtype=torch.float64)}, {}])
    assert {name: column.tolist() for name, column in table.read(torch.tensor([4])).items()} == {
        "score": [-1.0],
        "level": [2.0],
    }


def test_a_million_samples_are_found_again_after_moving_to_three_ranks() -> None:
    ids = torch.randperm(1_000_000, generator=torch.Generator().manual_seed(0)) * 7919 - 10**9
    piece = {"ids": ids, "score": ids.double() * 2, "level": ids.double()}
    tables = [SampleTable(facts(World(rank, 3)), DEFAULTS) for rank in range(3)]
    for table in tables:
        table.restore({}, [piece])
    assert sum(map(len, tables)) == 1_000_000
    alone = SampleTable(facts(), DEFAULTS)
    alone.restore({}, [table.local() for table in tables])
    asked = ids[::1000]
    assert torch.equal(alone.read(asked)["score"], asked.double() * 2)
