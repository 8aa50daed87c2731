"""Compiled blocks: what plain ones compute, for few shapes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vlm.model.tiny import CONTEXT, tiny_model
from vlm.errors import EveryRankError
from vlm.model import compiled
from vlm.model.compiled import compile_blocks

ROOT = Path(__file__).parents[3]


def beside_plain_ones(way: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.vlm.model.compiled_run", way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_captured_blocks_compute_what_plain_ones_do_once_for_each_shape() -> None:
    found = beside_plain_ones("counted")
    # Two blocks of each tower are of one kind; texts of 3 to 16 tokens are of one length.
    assert found["frames"] == 2
    assert found["worst"] < 1e-4
    assert found["same_names"]


@pytest.mark.long
def test_the_compiler_of_this_machine_makes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = beside_plain_ones("made")
    assert found["worst"] < 1e-4


def test_texts_are_padded_to_few_lengths_and_not_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LENGTH_STEP", 6)
    model = tiny_model()
    compile_blocks(model, ("text",))
    texts = [torch.ones(1, longest, dtype=torch.long) for longest in (2, 6, 7, 13, CONTEXT)]
    assert [model.text.in_steps(text).shape[1] for text in texts] == [6, 6, 12, CONTEXT, CONTEXT]
    assert not model.text.groups_texts


def test_without_towers_to_compile_nothing_changes() -> None:
    model = tiny_model()
    compile_blocks(model, ())
    assert model.text.groups_texts
    assert model.text.in_steps(torch.ones(1, 3, dtype=torch.long)).shape == (1, 3)
    assert all("forward" not in vars(block) for block in (*model.image.blocks(), *model.text.blocks()))


def test_a_tower_that_repeats_nothing_is_refused() -> None:
    model = tiny_model()
    model.image.trunk = torch.nn.Flatten()
    with pytest.raises(EveryRankError, match="compile: found image, which repeats no blocks; leave it out"):
        compile_blocks(model, ("image",))
