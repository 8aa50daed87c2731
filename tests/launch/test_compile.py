"""A run whose towers are compiled: it says what that took, and goes on to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.recipe import check_recipe
from tests.launch.tiny import assert_same_run, stopped_at, tiny_values, write_tiny, write_tiny_recipe
from vlm.errors import UserError


@pytest.mark.long
def test_it_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    write_tiny(tmp_path / "data")
    command = [sys.executable, "-m", "vlm", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    whole = write_tiny_recipe(tmp_path / "data", tmp_path / "whole", compile=["image", "text"])
    done = subprocess.run([*command, whole], env=environment, capture_output=True, text=True, check=True)
    assert "compile: the first step took " in done.stdout
    stopped_at(tmp_path / "whole", 6, tmp_path / "resumed")
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "other")
    resumed = [*command, whole, f"run={tmp_path / 'resumed'}", "--resume", "auto"]
    subprocess.run(resumed, env=environment, capture_output=True, check=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_a_part_that_is_not_compiled_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compile\.0: .*captioner.*image.*text"):
        check_recipe(tiny_values(tmp_path, tmp_path / "run", compile=["captioner"]), "a test")
