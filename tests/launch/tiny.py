"""A run so small that it can be started many times, on data with some of everything that is wrong."""

import multiprocessing
import re
import shutil
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch.recipe import load_recipe
from launch.train import train
from tests.data.small_shards import picture, sample, write_shard, write_source
from tests.launch.small import keys_of, metrics_of
from tests.ranks import run_ranks
from vlm.checkpoint.format import Checkpoint
from vlm.errors import UserError
from vlm.json_lines import read_lines

NUM_GOOD, NUM_BAD = 48, 3
MODEL = {
    "architecture": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
}


def write_tiny(folder: Path) -> None:
    """48 good samples in uneven shards, three bad ones, and one member that comes twice."""
    write_source(folder, [17, 5, 25], "train")
    bad = [sample(100, jpg=b"", txt="empty"), sample(101, jpg=picture(3)[:90], txt="cut"), sample(102, jpg=picture(4))]
    write_shard(folder / "train-98.tar", [sample(47), *bad, {"__key__": "000047", "txt": "again"}])


def tiny_values(folder: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """A recipe over the shards in `folder`, logged and recorded at every step; `data` in `changes` is added to it."""
    data = {"root": str(folder), "sources": {"pairs": {"shards": "train-*.tar"}}, "workers": 0, "shuffle_shards": 2}
    return {
        "run": str(run),
        "model": MODEL,
        "duration": "12 steps",
        "global_batch": 12,
        "optimizer": {"lr": 0.002},
        "schedule": {"warmup": "4 steps"},
        "log_every": "1 step",
        "checkpoint_every": "6 steps",
        "keep_checkpoints": None,
        "record_samples": True,
        "trackers": [],
        **changes,
        "data": {**data, **changes.get("data", {})},
    }


def write_tiny_recipe(folder: Path, run: Path, **changes: Any) -> str:
    """The tiny recipe as a file beside the run directory; its name."""
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tiny_values(folder, run, **changes)))
    return str(path)


def train_here(recipe: str, overrides: tuple[str, ...] = (), resume: str | None = None) -> None:
    """Train in this process, on one thread."""
    torch.set_num_threads(1)
    train(load_recipe(recipe, overrides, trust=True), resume=resume)


def assert_refused(recipe: str, run: Path, message: str) -> None:
    """Assert that a recipe ends in one line that `message` matches, before its run directory is made."""
    with pytest.raises(UserError) as caught:
        train(load_recipe(recipe))
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert not run.exists()


def train_ranks(world_size: int, recipe: str, *overrides: str, resume: str | None = None) -> None:
    """Train on real ranks to the end."""
    run_ranks(train_here, world_size, recipe, overrides, resume, group=False)


def start_life(recipe: str) -> ForkServerProcess:
    """Begin or resume a run in a process of its own, which may be killed."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=train_here, args=(recipe, (), "auto"), daemon=False)
    process.start()
    return process


def stopped_at(run: Path, step: int, to: Path) -> Path:
    """A copy of a run as a kill leaves it some steps after the checkpoint of `step`."""
    shutil.copytree(run, to)
    for later in (to / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    return to


def ledger_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's ledger."""
    return read_lines(run / "ledger.jsonl").records


def sets_of(run: Path) -> dict[int, list[str]]:
    """The sample keys of every global batch, sorted."""
    return {step: sorted(keys) for step, keys in sorted(keys_of(run).items())}


def assert_same_run(run: Path, whole: Path) -> None:
    """Samples, skips, metrics and every tensor of the last checkpoint are the same, bit for bit."""
    assert keys_of(run) == keys_of(whole)
    assert ledger_of(run) == ledger_of(whole)
    assert metrics_of(run) == metrics_of(whole)
    ends = [Checkpoint(sorted((path / "checkpoints").glob("step-*"))[-1]) for path in (run, whole)]
    assert ends[0].folder.name == ends[1].folder.name
    for group in ("weights", "exp_avg", "exp_avg_sq", "ema", "teacher", "memory"):
        assert ends[0].names(group) == ends[1].names(group)
        for name in ends[0].names(group):
            assert torch.equal(ends[0].tensor(group, name), ends[1].tensor(group, name)), (group, name)
    for piece, other in zip(ends[0].by_rank("own"), ends[1].by_rank("own"), strict=True):
        assert piece.keys() == other.keys()
        assert all(torch.equal(piece[name], other[name]) for name in piece)
