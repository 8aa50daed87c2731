"""A split language model: trained, stopped, resumed, evaluated and captioning without the folder that it came from."""

from pathlib import Path
from typing import Any

import pytest

from eval.captioning import CaptioningConfig
from launch.evaluate import evaluate_model
from launch.export import export_model
from launch.recipe import load_recipe
from launch.verify_gradients import verify
from tests.data.small_shards import with_json, write_shard
from tests.launch.small import metrics_of
from tests.launch.tiny import assert_same_run, stopped_at, train_here, train_ranks, write_tiny_recipe
from tests.vlm.model.hugging_face import save_language_model
from tests.vlm.model.tiny import TEXTS
from vlm.checkpoint.format import Checkpoint
from vlm.errors import UserError

VISION = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}


def recipe(folder: Path, run: Path, kind: str, split: dict[str, Any], **changes: Any) -> str:
    """Six steps of both terms on samples with one to three captions, in micro-batches."""
    samples = [with_json(n, captions=[f"{TEXTS[(n + k) % 4]} {n}" for k in range(1 + n % 3)]) for n in range(14)]
    write_shard(folder / "train-00.tar", samples)
    write_shard(folder / "test-00.tar", samples[:6])
    save_language_model(folder / "lm", kind)
    text = {"transformers": str(folder / "lm"), "pool": "query", "context_length": 16}
    towers = {"embed_dim": 8, "image": {"vision_cfg": VISION}, "text": text}
    captioner = {"heads": 2, "queries": 3, "pooler_heads": 2, "pooler": "single", "language_model": split}
    return write_tiny_recipe(
        folder,
        run,
        model={"towers": towers, "captioner": captioner},
        objective={"clip": 1.0, "caption": {"weight": 1.0, "captions": "all"}},
        data={"caption": {"policy": "all"}},
        duration="6 steps",
        checkpoint_every="3 steps",
        global_batch=7,
        micro_batch=4,
        optimizer={"lr": 0.02},
        **changes,
    )


def test_its_whole_life(tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    written = recipe(tmp_path, run, "gpt2", {"train": "lora", "lora": {"rank": 2, "dropout": 0.1}})
    assert verify(load_recipe(written))
    train_here(written)
    stopped_at(run, 3, again)
    train_here(written, (f"run={again}",), resume="auto")
    assert_same_run(again, run)
    first, last = (Checkpoint(run / f"checkpoints/step-0000000{step}") for step in (3, 6))
    learned = {name for name in last.names("exp_avg") if name.startswith(("text.model.", "decoder.layers."))}
    assert learned
    assert all("lora_" in name for name in learned)
    own = [name for name in last.names("weights") if name.startswith("text.model.") and "lora_" not in name]
    assert own
    assert all((first.tensor("weights", name) == last.tensor("weights", name)).all() for name in own)
    assert len([line for line in metrics_of(run) if "caption" in line]) == 6
    (tmp_path / "lm").rename(tmp_path / "gone")
    found = evaluate_model(str(run), CaptioningConfig(kind="caption", shards=str(tmp_path / "test-*.tar")))
    assert found["num_images"] == 6
    with pytest.raises(UserError, match="open_clip has no counterpart of the text tower"):
        export_model(str(run), "open_clip", tmp_path / "exported", [])


@pytest.mark.long
def test_on_two_ranks_it_learns_and_writes_the_same(tmp_path: Path) -> None:
    written = recipe(tmp_path, tmp_path / "run", "llama", {"train": "lora"})
    train_here(written)
    evaluate = {"captions": {"kind": "caption", "shards": "test-*.tar", "batch_size": 4}}
    written = recipe(tmp_path, tmp_path / "ranks", "llama", {"train": "lora"}, evaluate=evaluate, engine="zero3")
    train_ranks(2, written)
    losses = [[line["loss"] for line in metrics_of(tmp_path / run) if "loss" in line] for run in ("run", "ranks")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    shards = str(tmp_path / "test-*.tar")
    alone = evaluate_model(str(tmp_path / "ranks"), CaptioningConfig(kind="caption", shards=shards))
    ranks = {name: value for line in metrics_of(tmp_path / "ranks") for name, value in line.items()}
    for name in ("nll_per_token", "rouge_l", "caption_length"):
        assert ranks[f"eval/captions/{name}"] == pytest.approx(alone[name], rel=1e-5), name


def test_all_of_it_learns_its_captions(tmp_path: Path) -> None:
    written = recipe(tmp_path, tmp_path / "run", "llama", {"unimodal_layers": 1})
    train_here(written, ("duration=30 steps", "checkpoint_every=30 steps"))
    captions = [line["caption"] for line in metrics_of(tmp_path / "run") if "caption" in line]
    assert captions[-1] < captions[0] / 2
