"""An engine of one's own is named in a recipe as package.module:Class, trains, and counts as a program there."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.recipe import load_recipe
from launch.train import train
from tests.launch.small import metrics_of
from tests.launch.tiny import train_here, write_tiny, write_tiny_recipe
from vlm.errors import UserError

OWN = '''
from vlm.training.engines.ddp import DdpEngine

class Halved(DdpEngine):
    """Steps at half the rate that it is told."""

    def step(self, lr: float) -> float:
        return super().step(lr / 2)

class Other:
    """No engine."""
'''


def test_an_engine_from_outside_takes_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_engine.py").write_text(OWN)
    write_tiny(tmp_path)
    runs = {}
    ways: dict[str, dict[str, Any]] = {"own": {"engine": "own_engine:Halved"}, "half": {"optimizer": {"lr": 0.001}}}
    for name, changes in ways.items():
        recipe = write_tiny_recipe(tmp_path, tmp_path / name, duration="3 steps", **changes)
        if name == "own":
            with pytest.raises(UserError, match=r"engine: 'own_engine:Halved' would run as a program; --trust"):
                load_recipe(recipe)
            train(load_recipe(recipe, trust=True))
        else:
            train_here(recipe)
        runs[name] = [line["loss"] for line in metrics_of(tmp_path / name) if "loss" in line]
    assert runs["own"] == runs["half"]
    with pytest.raises(UserError, match=r"engine: engine 'own_engine:Other' is not a subclass of .*\.Engine"):
        load_recipe(recipe, ["engine=own_engine:Other"])


def test_another_engine_does_not_import_deepspeed() -> None:
    code = (
        "import sys; from vlm.training.engines.registry import ENGINES; from vlm.training.engines.start import *; "
        "print(ENGINES.find('ddp').__name__, 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["DdpEngine", "False"]
