"""Substitutes of bad samples: from nearby, decided once, on the disk before it is used, reused ever after."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from data.config import DataConfig
from data.loading.stream import TrainStream
from data.loading.substitution import ShardRow, Substitution, SubstitutionLog, substitutes
from data.order.order import Order, SourceCounts
from tests.data.small_shards import WordTokenizer, sample, write_shard
from vlm.batch import Batch, Images, Skip
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import TokenBatch

COUNTS = [20, 31, 17, 24, 28, 19, 22]
GLOBAL_BATCH = 6
NUM_STEPS = 12  # three epochs of the 24 samples of `write_pairs`
BROKEN = 5


def order(window: int = 3, lanes: int = 1, global_batch: int = 7) -> Order:
    return Order(3, [SourceCounts("a", COUNTS)], global_batch, lanes=lanes, window=window)


def planned(one: Order, step: int) -> list[ShardRow]:
    picks = one.picks(step, range(one.global_batch))
    return list(zip(picks.shards.tolist(), picks.rows.tolist(), strict=True))


def blocks_as_read() -> list[set[int]]:
    """The sets of shards that one lane shuffles together, seen from the order in which it comes upon them."""
    one = order(global_batch=1)
    shards = [planned(one, step)[0][0] for step in range(sum(COUNTS))]
    blocks: list[set[int]] = []
    left = dict(enumerate(COUNTS))
    for shard in shards:
        if not blocks or all(left[known] == 0 for known in blocks[-1]):
            blocks.append(set())
        blocks[-1].add(shard)
        left[shard] -= 1
    return blocks


def test_a_substitute_comes_first_from_the_shards_that_its_slot_was_shuffled_with() -> None:
    blocks = blocks_as_read()
    assert sorted(map(len, blocks)) == [2, 2, 3]
    one = order()
    for step in range(0, sum(COUNTS) // 7, 3):  # the first epoch
        for slot in (0, 3, 6):
            own = planned(one, step)[slot]
            (block,) = [block for block in blocks if own[0] in block]
            candidates = list(substitutes(one, 3, step, slot))
            assert {shard for shard, _ in candidates[:15]} <= block
            assert {shard for shard, _ in candidates} == set(range(len(COUNTS)))  # the whole source, in the end


@pytest.mark.parametrize(("global_batch", "lanes"), [(7, 1), (7, 7), (40, 8)])
def test_the_samples_of_its_own_batch_come_last(global_batch: int, lanes: int) -> None:
    one = order(lanes=lanes, global_batch=global_batch)
    for step in (0, 1, 50):
        for slot in (0, global_batch // 2, global_batch - 1):
            candidates = list(substitutes(one, 3, step, slot))
            assert len(set(candidates)) == len(candidates)
            batch = planned(one, step)
            others = set(batch) - {batch[slot]}
            assert set(candidates[-len(others) :]) == others
            assert not set(candidates[: -len(others)]) & set(batch)
            assert len(candidates) - len(others) > 100


def test_candidates_are_a_function_of_seed_step_and_slot() -> None:
    first = list(substitutes(order(), 3, 4, 5))
    assert list(substitutes(order(), 3, 4, 5)) == first
    for another in (substitutes(order(), 4, 4, 5), substitutes(order(), 3, 4, 6)):
        assert list(another)[:15] != first[:15]


def decision(step: int, slot: int = 0, row: int = 0) -> Substitution:
    skip = Skip("a", "/data/a.tar", f"{step}é", "it is empty", "/data/a.tar:3")
    return Substitution(step, slot, 9, "/data/a.tar", row, skip)


def loaded(folder: Path | None, start_step: int = 0, saved: Sequence[dict[str, object]] = ()) -> SubstitutionLog:
    log = SubstitutionLog(folder, "rank-00000")
    log.load(start_step, saved)
    return log


def record_and_die(folder: Path) -> None:
    SubstitutionLog(folder, "rank-00000").record(decision(12, 3))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_decision_outlives_a_process_that_is_killed_right_after_it(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=record_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert loaded(tmp_path).find(12, 3) == decision(12, 3)
    assert loaded(tmp_path).find(12, 2) is None


def test_a_torn_line_is_ignored_and_spoils_no_later_one(tmp_path: Path) -> None:
    log = SubstitutionLog(tmp_path, "rank-00000")
    log.record(decision(1))
    log.record(decision(2))
    (file,) = tmp_path.rglob("*.jsonl")
    whole = file.read_bytes()
    for torn in (whole[:-1], whole[:-30], whole + b"\0\0\0"):
        file.write_bytes(torn)
        found = loaded(tmp_path)
        assert found.find(1, 0) == decision(1)
        assert found.find(2, 0) in (None, decision(2))
        SubstitutionLog(tmp_path, "rank-00000").record(decision(3))  # as a process that was given the same number does
        found = loaded(tmp_path)
        assert (found.find(1, 0), found.find(3, 0)) == (decision(1), decision(3))


def test_no_flipped_bit_of_a_decision_is_accepted(tmp_path: Path) -> None:
    log = SubstitutionLog(tmp_path, "rank-00000")
    log.record(decision(1))
    log.record(decision(2))
    (file,) = tmp_path.rglob("*.jsonl")
    stored = file.read_bytes()
    both = [log.find(1, 0), log.find(2, 0)]
    for bit in range(0, 8 * len(stored), 7):
        damaged = bytearray(stored)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            found = loaded(tmp_path)
        except UserError as error:
            assert str(error).startswith(f"{file}: line ")  # noqa: PT017
            assert "is damaged" in str(error)  # noqa: PT017
        else:  # of two line breaks in a row, one is enough
            assert stored[bit // 8 : bit // 8 + 1] == b"\n"
            assert [found.find(1, 0), found.find(2, 0)] == both


def test_decisions_of_early_versions_are_read(tmp_path: Path) -> None:
    early = {"step": 4, "slot": 0, "bad_row": 9, "shard": "/data/a.tar", "row": 2}
    early["skip"] = {"source": "a", "shard": "/data/a.tar", "key": "k", "reason": "r", "substitute": "s"}
    line = json.dumps(early).encode()
    (tmp_path / "00000000").mkdir()
    (tmp_path / "00000000" / "rank-00000-1.jsonl").write_bytes(b"\n" + line + b"\n\n" + line[:-9])
    found = loaded(tmp_path).find(4, 0)
    assert found is not None
    assert (found.row, found.is_about(("/data/a.tar", "a.tar"), 9)) == (2, True)


def test_a_decision_stands_when_the_data_was_moved(tmp_path: Path) -> None:
    data = stream(write_pairs(tmp_path / "here", broken=True), tmp_path / "run")
    first = list(data.batches(0, NUM_STEPS))
    assert sum(len(batch.skipped) for batch in first) == 3
    write_pairs(tmp_path / "here", broken=False)
    (tmp_path / "here").rename(tmp_path / "there")
    again = resumed(str(tmp_path / "there" / "part-*.tar"), tmp_path / "run", (2, 0), 0)
    for ours, theirs in zip(again, first, strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.pixels, theirs.pixels)


def test_the_latest_decision_about_a_slot_counts(tmp_path: Path) -> None:
    saved = SubstitutionLog(None, "")
    saved.record(decision(1, row=7))
    saved.record(decision(2, row=7))
    for row in (1, 2):
        SubstitutionLog(tmp_path, f"rank-{9 - row}").record(decision(1, row=row))
        time.sleep(0.01)
    found = loaded(tmp_path, saved=saved.state(0))
    assert found.find(1, 0) == decision(1, row=2)
    assert found.find(2, 0) == decision(2, row=7)


def test_old_records_go_and_what_a_checkpoint_may_need_stays(tmp_path: Path) -> None:
    log = SubstitutionLog(tmp_path, "rank-00000")
    steps = (3, 999, 1000, 1998, 1999, 2500)
    for step in steps:
        log.record(decision(step))
    log.discard_folders_before(1999)
    found = loaded(tmp_path)
    assert all(found.find(step, 0) == decision(step) for step in steps if step >= 1999)
    assert found.find(3, 0) is None
    assert found.find(999, 0) is None
    assert [record["step"] for record in loaded(tmp_path).state(1999)] == [1999, 2500]
    log.discard_folders_before(10_000)
    assert not list(tmp_path.rglob("*.jsonl"))


def write_pairs(folder: Path, broken: bool) -> str:
    """24 samples in three shards; number `BROKEN` is no image, or is mended."""
    numbers = iter(range(24))
    for shard, count in enumerate([9, 4, 11]):
        samples = [sample(next(numbers)) for _ in range(count)]
        if shard == 0 and broken:
            samples[BROKEN] = sample(BROKEN, jpg=b"broken", txt="x")
        write_shard(folder / f"part-{shard}.tar", samples)
    return str(folder / "part-*.tar")


class Watching(WordTokenizer):
    """Counts the decisions on the disk when the captions of a batch are tokenized, before the batch is handed out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[int] = []

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        self.seen.append(len(loaded(self.folder).state(0)))
        return super().__call__(texts)


def stream(
    pattern: str,
    record: Path | None,
    world: World | None = None,
    workers: int = 0,
    tokenizer: WordTokenizer | None = None,
) -> TrainStream:
    config = DataConfig.model_validate({"sources": {"a": {"shards": pattern}}, "workers": workers, "prefetch": 4})
    return TrainStream(
        config,
        ImageSpec(size=16),
        tokenizer or WordTokenizer(),
        global_batch=GLOBAL_BATCH,
        seed=0,
        world=world or World(),
        record=record,
    )


def test_a_decision_is_on_the_disk_before_it_is_used(tmp_path: Path) -> None:
    tokenizer = Watching(tmp_path / "run" / "substitutions")
    batches = stream(write_pairs(tmp_path, broken=True), tmp_path / "run", tokenizer=tokenizer).batches(0, NUM_STEPS)
    made = [len(batch.skipped) for batch in batches]
    assert sum(made) == 3  # once an epoch
    assert tokenizer.seen == [sum(made[: step + 1]) for step in range(NUM_STEPS)]


def assert_same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.step, a.keys, a.skipped) == (b.step, b.keys, b.skipped)
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.pixels, b.pixels)


def joined(ranks: Sequence[Sequence[Batch]]) -> list[Batch]:
    """Global batches from each rank's rows."""
    return [
        Batch(
            step=parts[0].step,
            sample_ids=torch.cat([part.sample_ids for part in parts]),
            keys=tuple(key for part in parts for key in part.keys),
            parts={"image": Images(torch.cat([part.pixels for part in parts]))},
            skipped=tuple(skip for part in parts for skip in part.skipped),
        )
        for parts in zip(*ranks, strict=True)
    ]


def resumed(
    pattern: str, record: Path | None, ways: tuple[int, int], start: int, state: dict[str, object] | None = None
) -> list[Batch]:
    """The global batches from `start` on at (world size, workers)."""
    ranks = []
    for rank in range(ways[0]):
        data = stream(pattern, record, World(rank, ways[0]), ways[1])
        data.restore(state or {})
        ranks.append(list(data.batches(start, NUM_STEPS - start)))
    return joined(ranks)


@pytest.mark.parametrize("ways", [(1, 0), (1, 2), (2, 1), (3, 0)])
def test_a_decision_stands_although_the_sample_can_be_read_again(tmp_path: Path, ways: tuple[int, int]) -> None:
    data = stream(write_pairs(tmp_path, broken=True), tmp_path / "run")
    first = list(data.batches(0, NUM_STEPS))
    made = [batch.step for batch in first if batch.skipped]
    pattern = write_pairs(tmp_path, broken=False)
    assert not any(batch.skipped for batch in resumed(pattern, None, ways, 0))  # it would be used now
    start = made[1]  # an earlier step than the first life came to
    assert_same(resumed(pattern, tmp_path / "run", ways, start), first[start:])
    state = json.loads(json.dumps(data.state(start)))  # as a checkpoint keeps it
    assert [record["step"] for record in state["substitutions"]] == made[1:]
    assert_same(resumed(pattern, tmp_path / "other", ways, start, state), first[start:])


def test_what_was_decided_for_prefetched_batches_is_in_the_state(tmp_path: Path) -> None:
    whole = list(stream(write_pairs(tmp_path, broken=True), None).batches(0, NUM_STEPS))
    made = [batch.step for batch in whole if batch.skipped]
    data = stream(str(tmp_path / "part-*.tar"), tmp_path / "run", workers=2)
    batches = data.batches(0, NUM_STEPS)
    next(batches)  # two workers with four batches each: at least the first epoch is being read
    deadline = time.monotonic() + 60
    while not (state := data.state(1))["substitutions"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    batches.close()  # type: ignore[attr-defined]
    ahead = [record["step"] for record in state["substitutions"]]
    for worker in range(2):  # each reads every other batch, in order, however far the other one is
        own, ahead_of_it = ([step for step in steps if step % 2 == worker] for steps in (made, ahead))
        assert ahead_of_it == own[: len(ahead_of_it)]
    assert set(ahead) <= set(made)
    assert min(ahead) >= 1
    pattern = write_pairs(tmp_path, broken=False)
    again = resumed(pattern, tmp_path / "other", (2, 0), 1, state)
    for batch in again:
        assert bool(batch.skipped) == (batch.step in ahead)
        if batch.step in ahead:
            assert batch.keys == whole[batch.step].keys
