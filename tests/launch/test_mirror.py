"""A run whose machine is lost goes on from the store that it was copied to, bit for bit."""

import shutil
from pathlib import Path

import pytest

from data.shards.retry import RetryConfig
from launch.checkpoint_copy import newest_stored
from launch.mirror import leave_later
from launch.recipe import load_recipe
from launch.train import train
from tests.launch.flaky_store import fresh_store
from tests.launch.tiny import assert_same_run, train_here, write_tiny, write_tiny_recipe
from vlm.errors import UserError

QUICK = {"attempts": 3, "first_wait": 0.001, "longest_wait": 0.002}


def test_a_lost_run_goes_on_from_its_mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path / "data")
    store, run = fresh_store(), tmp_path / "run"
    recipe = write_tiny_recipe(tmp_path / "data", run, sync="flaky://bucket/run", data={"retry": QUICK})
    store.failures += ["lost", "cut"]
    train_here(recipe)
    assert store.stored[-1] == "manifest.json"
    whole = run.rename(tmp_path / "whole")
    # As a machine leaves it that was lost while the last checkpoint was on its way: without its manifest.
    (last,) = [name for name in store.store if name.endswith("bucket/run/checkpoints/step-00000012/manifest.json")]
    del store.store[last]
    capsys.readouterr()
    train_here(recipe, resume="auto")
    told = f"{run} is empty: its last checkpoint was fetched from flaky://bucket/run/checkpoints/step-00000006"
    assert told in capsys.readouterr().out
    assert_same_run(run, whole)
    assert last in store.store
    with pytest.raises(UserError, match="sync: flaky://bucket/run already holds a run; go on with it by --resume auto"):
        train_here(recipe, (f"run={tmp_path / 'other'}",))
    leave_later("flaky://bucket/run", 6, RetryConfig())  # as a run does that goes back to step 6
    assert newest_stored("flaky://bucket/run") == "flaky://bucket/run/checkpoints/step-00000006"
    shutil.rmtree(run)
    store.failures += ["refused"] * 9
    store.store.clear()
    train_here(recipe, resume="auto")  # nothing is there: it begins
    assert_same_run(run, whole)
    told = "step 12: its checkpoint could not be copied to flaky://bucket/run: flaky://bucket/run/checkpoints/step-0000"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sync", "words"),
    [
        ("/mnt/run", "sync: '/mnt/run' is no store that can be written to; write one as in s3://bucket/run"),
        ("pipe:cat", "sync: 'pipe:cat' is no store"),
        ("https://example.org/run", "sync: 'https://example.org/run' is no store"),
        ("s4://bucket", "s4://bucket/.vlm-probe: unknown scheme s4://"),
    ],
)
def test_what_is_no_store_is_refused(tmp_path: Path, sync: str, words: str) -> None:
    write_tiny(tmp_path)
    with pytest.raises(UserError) as caught:
        train(load_recipe(write_tiny_recipe(tmp_path, tmp_path / "run", sync=sync), trust=True))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
