"""A folder in which an earlier filter left something damaged, and shards with any name: one line, or made anew."""

import json
from pathlib import Path

import pytest

from data.filter.names import output_names
from data.filter.rules import AlignRules, Rule
from data.filter.run import FilterJob, filter_shards
from tests.data.small_shards import picture, sample, write_shard
from vlm.errors import UserError

RULES = AlignRules(without=(Rule.RARE_TOKEN,))


@pytest.fixture
def filtered(tmp_path: Path) -> FilterJob:
    """A filter that has run."""
    samples = [sample(n, jpg=picture(n, (300, 260)), txt=f"a nice dog number {n}") for n in range(3)]
    job = FilterJob((str(write_shard(tmp_path / "a.tar", samples)),), RULES, tmp_path / "out")
    filter_shards(job, workers=1)
    return job


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff{", b"[" * 100_000])
def test_damaged_settings_of_counts_are_no_counts(filtered: FilterJob, content: bytes) -> None:
    settings = filtered.work_folder / "counts" / "counts.json"
    before = settings.read_bytes()
    settings.write_bytes(content)
    with pytest.raises(UserError, match=r"^--counts: .* holds no counts"):
        filter_shards(
            FilterJob(filtered.shards, RULES, filtered.out.with_name("other"), counts=settings.parent), workers=1
        )
    assert filter_shards(filtered, workers=1).shards_written == 1
    assert settings.read_bytes() == before


@pytest.mark.parametrize("folder", ["rows", "counts"])
@pytest.mark.parametrize("content", [b"", b"no parquet"])
def test_a_damaged_table_is_told_with_the_way_out(filtered: FilterJob, folder: str, content: bytes) -> None:
    for table in (filtered.work_folder / folder).glob("*.parquet"):
        table.write_bytes(content)
    with pytest.raises(UserError, match=r"out/work: what an earlier run left there is damaged .*remove the folder"):
        filter_shards(filtered, workers=1)


def test_a_damaged_mark_is_that_of_another_filter(filtered: FilterJob) -> None:
    (filtered.out / "filter-settings.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="holds the result of another filter"):
        filter_shards(filtered, workers=1)
    assert json.loads((filtered.out / "filter.json").read_text())["shards_written"] == 1


def test_no_name_of_a_shard_leads_out_of_the_folder_of_copies() -> None:
    assert output_names(["https://h/a.tar", "https://h//tmp/b.tar"]) == {
        "https://h/a.tar": "a.tar",
        "https://h//tmp/b.tar": "tmp/b.tar",
    }
    assert output_names(["memory:///a/x.tar", "memory://b/y.tar"]) == {
        "memory:///a/x.tar": "a/x.tar",
        "memory://b/y.tar": "b/y.tar",
    }
    for name in (f"https://h/{'x' * 300}.tar", "https://h/a\x1b.tar"):
        with pytest.raises(UserError, match=r"^SHARDS: "):
            output_names([name])
