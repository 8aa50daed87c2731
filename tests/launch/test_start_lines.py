"""Lines that a run prints before its first step; and its own evaluations, which are those of `vlm eval`."""

from pathlib import Path

import pytest

from eval.retrieval import RetrievalConfig
from launch.evaluate import evaluate_model
from tests.launch.small import metrics_of
from tests.launch.tiny import train_here, write_tiny, write_tiny_recipe
from vlm.checkpoint.format import Checkpoint


def test_a_run_says_what_it_is_and_evaluates_in_fp32_whatever_it_trains_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    run = tmp_path / "run"
    evaluation = {"kind": "retrieval", "shards": str(tmp_path / "train-*.tar"), "batch_size": 16}
    recipe = write_tiny_recipe(tmp_path, run, duration="4 steps", precision="bf16", evaluate={"r": evaluation})
    train_here(recipe)
    said = capsys.readouterr().out
    checkpoint = Checkpoint(run / "checkpoints" / "step-00000004")
    count = sum(checkpoint.tensor("weights", name).numel() for name in checkpoint.names("weights"))
    for line in (
        f"run {run}: 1 rank on 1 machine (1 x cpu, 1 thread each), engine ddp, precision bf16\n",
        f"model ViT + transformer: {count:,} parameters, all trained; images 16 x 16\n",
        "data 51 samples in 4 shards: 12 a step, 4 steps, 0.9412 epochs; begins at step 0\n",
        "training begins: the first batch is being loaded\n",
        "epoch 0.94  loss ",
    ):
        assert line in said
    in_training = {
        key.removeprefix("eval/r/"): value
        for line in metrics_of(run)
        for key, value in line.items()
        if key.startswith("eval/r/")
    }
    config = RetrievalConfig.model_validate(evaluation)
    assert evaluate_model(str(run), config, tmp_path / "figures.json") == in_training
    assert '"precision": "fp32"' in (tmp_path / "figures.json").read_text()
