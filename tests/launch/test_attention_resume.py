"""Attention measured anew on another day: a run goes on as it began, by what its checkpoint says, to the same bits."""

from pathlib import Path

import pytest
import torch

from launch.recipe import Recipe, load_recipe
from launch.train import train
from tests.launch.tiny import assert_same_run, stopped_at, write_tiny, write_tiny_recipe
from vlm.checkpoint.format import Checkpoint
from vlm.model import attention_measurement


def _measure_always(monkeypatch: pytest.MonkeyPatch, cache: Path, faster: str) -> None:
    """Every shape, measured on a machine where this way is the faster."""
    monkeypatch.setenv("VLM_CACHE", str(cache))
    slower = {"fused": "explicit", "explicit": "fused"}[faster]
    monkeypatch.setattr(attention_measurement, "_times", lambda *_: {faster: 1.0, slower: 1.4})


def _recipe(data: Path, run: Path) -> Recipe:
    return load_recipe(write_tiny_recipe(data, run, precision="bf16"))


def test_a_resumed_run_takes_the_attention_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    write_tiny(tmp_path / "data")
    whole, resumed, other = (tmp_path / name for name in ("whole", "resumed", "other"))
    _measure_always(monkeypatch, tmp_path / "cache", "explicit")
    train(_recipe(tmp_path / "data", whole))
    _measure_always(monkeypatch, tmp_path / "another", "fused")
    train(_recipe(tmp_path / "data", stopped_at(whole, 6, resumed)), resume="auto")
    train(_recipe(tmp_path / "data", other))
    assert_same_run(resumed, whole)
    ends = [Checkpoint(run / "checkpoints/step-00000012") for run in (whole, resumed, other)]
    assert [{one.ways[0][1] for one in end.manifest.attention} for end in ends] == [{"explicit"}] * 2 + [{"fused"}]
    weights = [end.tensors("weights") for end in (ends[0], ends[2])]
    assert not all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
