"""The record of its data in a checkpoint tells which source, and which shards, are not what they were."""

import pytest

from vlm.checkpoint.data_record import DataRecord, differences, is_known, runs_of_shards

NAMES = tuple(f"{n}.tar" for n in range(130))


def record(samples: int = 10, content: str = "abc") -> DataRecord:
    return DataRecord(samples=samples, shards=len(content), content=tuple(content))


@pytest.mark.parametrize("shards", [1, 2, 63, 64, 65, 130, 10_000])
def test_runs_cover_every_shard_once(shards: int) -> None:
    runs = runs_of_shards(shards)
    assert len(runs) == min(shards, 64)
    assert [shard for run in runs for shard in run] == list(range(shards))


def test_a_number_alone_is_a_record() -> None:
    assert DataRecord.model_validate(7) == DataRecord(samples=7)
    assert DataRecord.model_validate(record().model_dump()) == record()
    assert is_known({"a": record()})
    assert not is_known({"a": record(), "b": DataRecord(samples=7)})


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"a": record()}, None),
        ({"a": DataRecord(samples=10)}, None),
        ({"a": record(11)}, "a had 10 samples, now there are 11"),
        ({"a": record(content="abcd")}, "a had 3 shards, now there are 4"),
        ({"a": record(content="abd")}, "a holds other samples or texts, or other names of shards, in 2.tar"),
        ({"a": record(content="xyz")}, "in 0.tar, 1.tar, 2.tar"),
        ({"b": record()}, "it had the sources a, in this order; now there are b"),
    ],
)
def test_what_differs_is_named(now: dict[str, DataRecord], said: str | None) -> None:
    told = differences({"a": record()}, now, dict.fromkeys(now, NAMES))
    assert (told is None) if said is None else (told is not None and said in told)
    assert differences({"a": DataRecord(samples=10)}, {"a": record()}, {}) is None


def test_one_of_many_shards_is_named_by_its_run() -> None:
    hashes = [str(n) for n in range(64)]
    before, now = (
        DataRecord(samples=1, shards=130, content=tuple(one)) for one in (hashes, [*hashes[:5], "x", *hashes[6:]])
    )
    assert differences({"a": before}, {"a": now}, {"a": NAMES}) == (
        "a holds other samples or texts, or other names of shards, in one of the 2 shards 10.tar to 11.tar"
    )


def test_the_order_of_sources_is_part_of_the_data() -> None:
    assert differences({"a": record(), "b": record()}, {"b": record(), "a": record()}, {}) is not None
