"""`vlm replay`: a step as the run took it, and the first layer, term or gradient in it that is not finite."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from launch.main import app
from launch.recipe import load_recipe
from launch.replay import replay
from tests.launch.small import keys_of, metrics_of
from tests.launch.test_spikes import BACK, recipe_of
from tests.launch.tiny import train_here, write_tiny
from tests.ranks import run_ranks
from tests.vlm.training.poison import _Spoiled
from tests.vlm.training.toy import WHOLE, Setup, start, toy_batch, train_state
from vlm.errors import UserError
from vlm.training.anomaly import Finding, find_first, pair_losses


class Spoils(nn.Module):
    """A layer whose output, or whose gradient alone, is no number on rank 1."""

    def __init__(self, what: str, rank: int) -> None:
        super().__init__()
        self.what = what if rank == 1 else ""

    def forward(self, values: Tensor) -> Tensor:
        if self.what == "gradient":
            spoiled: Tensor = _Spoiled.apply(values, torch.nan)
            return spoiled
        return values * torch.nan if self.what == "output" else values


def findings(what: str) -> tuple[Finding, dict[str, float]]:
    """What this rank finds in a step of the toy with such a layer, and how far its weights have moved then."""
    engine = start(Setup(), 2)
    setattr(engine.module.image, "1", Spoils(what, engine.world.rank))
    state, before = train_state(engine), {name: p.detach().clone() for name, p in engine.parameters().items()}
    batch = toy_batch(0, engine.world.rank, 2)
    found = find_first(state, batch, WHOLE, seed=0)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in engine.parameters().items()}
    engine.accelerator.end_training()
    return found, moved


@pytest.mark.slow
def test_the_layer_is_named_on_the_rank_that_has_it_and_nothing_is_updated() -> None:
    (clean, moved), (spoiled, also_moved) = run_ranks(findings, 2, "output", group=False)
    assert (clean.forward, clean.samples) == (None, ())
    assert spoiled.forward == "image.1"
    assert spoiled.samples == tuple(toy_batch(0, 1, 2).keys)
    assert set(moved.values()) == set(also_moved.values()) == {0.0}
    _, (spoiled, _) = run_ranks(findings, 2, "gradient", group=False)
    assert (spoiled.forward, spoiled.terms, spoiled.samples) == (None, {}, ())
    assert (spoiled.backward, spoiled.last_finite) == ("the output of image.0", "the output of image.1")


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run saved every three steps that went back from step 8 to 3, and had no finite gradient in step 11."""
    folder = tmp_path_factory.mktemp("replay")
    write_tiny(folder)
    poison = {"tests.vlm.training.poison:PoisonedGradient": {"weight": 1.0, "steps": [10]}}
    spike = {"tests.vlm.training.poison:Spike": {"weight": 1.0, "steps": [7], "loss": 200.0}}
    recipe = recipe_of(folder, folder / "run", BACK, objective={"clip": 1.0, **poison, **spike})
    train_here(recipe)
    return recipe, folder / "run"


@pytest.mark.slow
def test_a_step_is_as_the_run_took_it_also_after_a_roll_back(rolled_back: tuple[str, Path]) -> None:
    recipe, run = rolled_back
    by_step = {line["step"]: line["loss"] for line in metrics_of(run) if "loss" in line}
    files = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    for step in (1, 5, 9, 12):
        (found,) = replay(load_recipe(recipe, trust=True), step, trust=True)
        assert found.loss == by_step[step]
        assert (found.forward, found.backward, found.terms) == (None, None, {})
        assert sum(found.shares) == pytest.approx(1)
        assert len(found.shares) == len(keys_of(run)[step])
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == files
    with pytest.raises(UserError, match="--step 13: the run has 12 steps"):
        replay(load_recipe(recipe, trust=True), 13, trust=True)


@pytest.mark.slow
def test_the_command_names_the_operation_and_the_samples(
    rolled_back: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = rolled_back
    file = tmp_path / "found.json"
    arguments = ["replay", str(run), "--step", "11", "--trust", "--json", str(file)]
    app(arguments, prog_name="vlm", standalone_mode=False)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"step 11 of {run}, from the checkpoint of step 9 and 1 steps since, on 1 rank"
    assert "the first gradient that is not finite is at " in said[1]
    assert ", made by _SpoiledBackward, called at poison.py:" in said[1]
    assert said[2].startswith("largest parts of the contrastive loss: 0")
    keys = keys_of(run)[11]
    assert said[3] == f"samples: {', '.join(keys[:8])} and 4 more (--json)"
    (rank,) = json.loads(file.read_text())["ranks"]
    assert rank["keys"] == keys


def test_the_loss_of_a_pair_is_that_of_a_double_loop() -> None:
    torch.manual_seed(0)
    image, text = (nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1) for _ in range(2))
    found = pair_losses(image, text, torch.tensor([7.0]))
    for i in range(5):
        row = [float(7 * image[i] @ text[j]) for j in range(5)]
        column = [float(7 * image[j] @ text[i]) for j in range(5)]
        parts = [torch.tensor(line, dtype=torch.float64).softmax(0)[i].log() for line in (row, column)]
        assert float(found[i]) == pytest.approx(-float(sum(parts)) / 2, abs=1e-12)
