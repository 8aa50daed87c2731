"""A run whose shards come over a bad line trains on what a local run does, and fetches each shard once a node."""

from pathlib import Path

import pytest

from tests.data.http_server import FaultyServer
from tests.launch.small import keys_of
from tests.launch.tiny import ledger_of, train_ranks, write_tiny, write_tiny_recipe

SHARDS = ["train-00.tar", "train-01.tar", "train-02.tar", "train-98.tar"]
QUICK = {"attempts": 6, "first_wait": 0.01, "longest_wait": 0.02}


@pytest.mark.slow
def test_a_remote_run_is_the_local_one(tmp_path: Path) -> None:
    write_tiny(tmp_path / "data")
    local = write_tiny_recipe(tmp_path / "data", tmp_path / "local", data={"workers": 2})
    with FaultyServer(tmp_path / "data") as server:
        data = {
            "root": None,
            "sources": {"pairs": {"shards": [server.url(name) for name in SHARDS]}},
            "workers": 2,
            "cache": {"folder": str(tmp_path / "cache")},
            "retry": QUICK,
        }
        remote = write_tiny_recipe(tmp_path / "data", tmp_path / "remote", data=data)
        cut_after = {name: (tmp_path / "data" / name).stat().st_size // 3 for name in SHARDS[:2]}
        for name, after in cut_after.items():
            server.cut(name, 1, after)
        server.fail(SHARDS[1], 2)
        server.fail(SHARDS[2], 1, status=500)
        train_ranks(2, remote)
        tars = {name: server.gets(name) for name in SHARDS}
        train_ranks(1, remote, f"run={tmp_path / 'again'}")
        assert {name: server.gets(name) for name in SHARDS} == tars  # all of it is on the node now
    # One GET a shard for all processes of both ranks, and another one where a connection broke off or was refused.
    assert tars["train-98.tar"] == 1
    assert tars["train-00.tar"] == 2
    assert max(tars.values()) <= 4
    copies = sorted(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    stored = [(tmp_path / "data" / name).read_bytes() for name in SHARDS]
    assert all(shard in copies for shard in stored)
    assert not list((tmp_path / "data").glob("*.vlm*"))
    train_ranks(1, local)  # the same order on one rank, which starts sooner
    assert keys_of(tmp_path / "remote") == keys_of(tmp_path / "local")
    ours, theirs = (
        [
            (line["step"], line["key"], line["reason"], Path(line["substitute"]).name)
            for line in ledger_of(tmp_path / run)
        ]
        for run in ("remote", "local")
    )
    assert ours == theirs
