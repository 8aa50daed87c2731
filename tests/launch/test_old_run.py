"""A run of an older version: its checkpoint is read, gone on from and evaluated.

`old_run.tar.xz` is a run of 6 steps on two ranks over `write_tiny`'s data as version 0.1.0 wrote it, with the
checkpoint of step 3 and the metrics of all steps; its tokens' embeddings were set to one value, so that it is small.
"""

import tarfile
from pathlib import Path

import pytest
import torch

from eval.run_record import read_run
from launch.evaluate import evaluate_model, evaluator_config
from launch.recipe import load_recipe
from launch.train import train
from tests.launch.small import losses_of
from tests.launch.tiny import write_tiny
from vlm.checkpoint.format import Checkpoint
from vlm.distributed.world import World

OLD = Path(__file__).parent / "old_run.tar.xz"
STEP_3 = Path("run/checkpoints/step-00000003")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run beside its data, whose paths are relative."""
    write_tiny(tmp_path / "data")
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def test_it_is_read(run: Path) -> None:
    checkpoint = Checkpoint(STEP_3)
    checkpoint.verify(World())
    assert checkpoint.manifest.step == 3
    assert checkpoint.manifest.format == "vlm-checkpoint-1"
    assert [len(checkpoint.names(group)) > 0 for group in ("weights", "ema", "teacher", "exp_avg", "memory")] == [
        True
    ] * 5
    assert len(checkpoint.by_rank("own")) == 2
    record = read_run(run)
    assert len(record.training) == 6
    assert record.facts["world_size"] == 2


@pytest.mark.slow
def test_it_goes_on_and_its_losses_are_those_of_the_uninterrupted_run(run: Path) -> None:
    expected = losses_of(run)
    torch.set_num_threads(1)
    train(load_recipe("run/recipe.yaml"), resume="auto")
    assert losses_of(run) == pytest.approx(expected, rel=1e-4)


def test_it_is_evaluated(run: Path) -> None:
    figures = evaluate_model(str(run), evaluator_config("retrieval", shards="data/train-0[02].tar"))
    assert figures["num_images"] == 42
    # As version 0.1.0 measured them.
    assert figures["image_to_text_r@10"] == pytest.approx(0.2857, abs=0.05)
    assert figures["text_to_image_r@10"] == pytest.approx(0.2381, abs=0.05)
    assert figures["text_to_image_median_rank"] == pytest.approx(21.5, abs=2)
