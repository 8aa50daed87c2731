"""Skipped and seen samples, over all ranks: told in full, and a stop in one line when too much is bad."""

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from vlm.batch import Batch, Skip
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.json_lines import read_lines
from vlm.training.hooks.ledger import Ledger
from vlm.training.run_directory import RunDirectory
from vlm.training.skips import check_bad_fraction

DEFAULT_SHARE = 0.01
GLOBAL_BATCH = 100


def skips(count: int, reason: str = "it is empty", source: str = "web", start: int = 0) -> tuple[Skip, ...]:
    return tuple(Skip(source, "/d/a.tar", f"{start + n:03d}", reason, "/d/a.tar:good") for n in range(count))


def batch(skipped: tuple[Skip, ...] = (), counts: dict[str, int] | None = None) -> Batch:
    return Batch(
        step=0,
        sample_ids=torch.arange(2),
        keys=("a", "b"),
        parts={},
        skipped=skipped,
        counts=counts or {},
    )


def ledger(folder: Path, share: float = DEFAULT_SHARE, start_step: int = 0) -> Ledger:
    run = RunDirectory(folder / "run", World.current())
    run.start({}, {})
    run.release()
    return Ledger(run, share, GLOBAL_BATCH, start_step)


def test_ten_bad_samples_among_the_first_thousand_pass_and_the_eleventh_stops_the_run(tmp_path: Path) -> None:
    one = ledger(tmp_path)
    one.add(batch(skips(10)))
    one.flush(1)  # ten of a hundred
    assert one.num_skipped == 10
    one.flush(10)
    one.add(batch(skips(1, start=10)))
    with pytest.raises(
        UserError, match=r"^data\.max_bad_share: 11 of 1,000 samples could not be used, more than 1\.00%"
    ):
        one.flush(10)
    assert len((tmp_path / "run/ledger.jsonl").read_text().splitlines()) == 11  # the file names the last one too


def test_a_checkpoint_comes_after_all_that_was_skipped_before_it(tmp_path: Path) -> None:
    one = ledger(tmp_path)
    one.add(batch(skips(2), {"source/web": 3}))
    assert one.manifest_fields(1) == {"counts": {"source/web": 3}}
    assert len((tmp_path / "run/ledger.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("bad", "samples", "share", "stops"),
    [
        (10, 1, 0.01, False),
        (11, 1, 0.01, True),
        (20, 2_000, 0.01, False),
        (21, 2_000, 0.01, True),
        (1, 10**6, 0.0, True),
        (0, 10**6, 0.0, False),
        (10**6, 10**6, 1.0, False),
        (499, 1_000, 0.5, False),
        (501, 500, 0.5, True),
    ],
)
def test_the_share_is_of_the_samples_so_far_but_of_a_thousand_at_least(
    bad: int, samples: int, share: float, stops: bool
) -> None:
    if stops:
        with pytest.raises(UserError):
            check_bad_fraction({"web: it is empty": bad}, samples, share)
    else:
        check_bad_fraction({"web: it is empty": bad}, samples, share)


def test_the_line_names_the_commonest_reasons(tmp_path: Path) -> None:
    one = ledger(tmp_path)
    for count, reason, source in (
        (2, "rare", "web"),
        (2_000, "it is empty", "web"),
        (7, "it is empty", "coco"),
        (30, "no caption", "web"),
        (1, "odd", "web"),
    ):
        one.add(batch(skips(count, reason, source)))
    with pytest.raises(UserError) as error:
        one.flush(100)
    assert str(error.value) == (
        "data.max_bad_share: 2,040 of 10,000 samples could not be used, more than 1.00% "
        "(2,000 x web: it is empty; 30 x web: no caption; 7 x coco: it is empty; and 2 other reasons); "
        "the run's ledger.jsonl names each"
    )


def test_a_resumed_run_counts_on_and_is_judged_by_what_it_sees_itself(tmp_path: Path) -> None:
    first = ledger(tmp_path)
    first.add(batch(skips(10)))
    first.flush(1)
    again = ledger(tmp_path, start_step=1)
    assert again.num_skipped == 10
    again.add(batch(skips(10)))
    again.flush(2)
    assert again.num_skipped == 20


COUNTS = [
    {"source/web": 5, "source/coco": 1, "caption/txt": 4, "caption/alt": 2},
    {"source/web": 2, "source/coco": 4, "caption/txt": 6},
]


def one_rank(folder: str, parts: list[int]) -> tuple[dict[str, float], dict[str, float], int]:
    world = World.current()
    one = ledger(Path(folder))
    for number in parts[world.rank :: world.size]:
        one.add(batch(skips(2, reason=f"reason {number}", start=10 * number), COUNTS[number]))
    one.flush(3)
    return one.fractions(), one.fractions(), one.num_skipped


@pytest.mark.parametrize("world_size", [1, 2])
def test_shares_and_skips_are_those_of_all_ranks(tmp_path: Path, world_size: int) -> None:
    for shares, later, num_skipped in run_ranks(one_rank, world_size, str(tmp_path), [0, 1]):
        assert shares == {
            "data/source/web": 7 / 12,
            "data/source/coco": 5 / 12,
            "data/caption/txt": 10 / 12,
            "data/caption/alt": 2 / 12,
        }
        assert later == {}  # since the last call
        assert num_skipped == 4
    lines = read_lines(tmp_path / "run/ledger.jsonl").records
    assert [line["key"] for line in lines] == ["000", "001", "010", "011"]
    assert lines[3] == {
        "step": 1,  # in which it was skipped, whenever that is written
        "source": "web",
        "shard": "/d/a.tar",
        "key": "011",
        "reason": "reason 1",
        "substitute": "/d/a.tar:good",
    }


def too_much(folder: str) -> str:
    one = ledger(Path(folder))
    if World.current().rank == 1:
        one.add(batch(skips(11)))
    try:
        one.flush(1)
    except UserError as error:
        return str(error)
    return ""


def test_all_ranks_stop_together(tmp_path: Path) -> None:
    first, second = run_ranks(too_much, 2, str(tmp_path))
    assert first == second
    assert first.startswith("data.max_bad_share: 11 of 100 ")
