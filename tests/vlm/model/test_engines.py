"""Each kind of tower under engines that shard its parameters: gradients of one process on the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.ranks import run_ranks
from tests.vlm.model.hugging_face import save_text_model, save_vision_model
from tests.vlm.model.tiny import TEXT, TEXTS, VIT, outputs_of, some_images
from vlm.batch import Batch, Images, Texts
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.training.accumulation import accumulate
from vlm.training.assembly import assemble, build_objective
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.registry import EngineName
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan

ROWS = 4


def _fields(kind: str, folder: Path) -> dict[str, Any]:
    image: dict[str, Any] = {"vision_cfg": VIT}
    text: dict[str, Any] = {"text_cfg": TEXT}
    if kind == "class token":
        text = {"text_cfg": {**TEXT, "embed_cls": True}}
    if kind == "transformers":
        save_vision_model(folder / "image")
        save_text_model(folder / "text")
        image = {"transformers": str(folder / "image"), "pool": "first"}
        text = {"transformers": str(folder / "text"), "context_length": 16}
    return {"towers": {"embed_dim": 24, "image": image, "text": text}}


def _gradients(engine_name: EngineName, fields: dict[str, Any], world_size: int) -> dict[str, Tensor]:
    settings = EngineSettings(engine_name, ROWS // world_size)
    accelerator = start_accelerator(settings)
    model = build_model(ModelConfig.model_validate(fields), seed=1)
    tokenizer = model.tokenizer
    config = TrainingConfig(global_batch=ROWS)
    objective = build_objective(config, model, ROWS, World.current(accelerator.device))
    engine = assemble(config, settings, accelerator, model, objective).engine
    count, rank = ROWS // world_size, engine.world.rank
    rows = slice(rank * count, (rank + 1) * count)
    # Each rank's texts are as long as its own longest.
    tokens, lengths = tokenizer(TEXTS[rows])
    batch = Batch(
        step=0,
        sample_ids=torch.arange(rows.start, rows.stop),
        keys=tuple(TEXTS[rows]),
        parts={"image": Images(some_images(ROWS)[rows]), "text": Texts(tokens, lengths)},
    )
    engine.warm_up(batch)
    accumulate(engine, objective, batch, MicroBatchPlan(ROWS, world_size), seed=0)
    return {name: engine.gradient(name).clone() for name in engine.parameters()}


def _whole_batch_gradients(fields: dict[str, Any]) -> dict[str, Tensor]:
    """The definition: cross-entropy both ways over the whole batch, in one process."""
    model = build_model(ModelConfig.model_validate(fields), seed=1)
    outputs = outputs_of(model, some_images(ROWS))
    logits = outputs["logit_scale"] * outputs["image"] @ outputs["text"].T
    pairs = torch.arange(ROWS)
    ((cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("causal", "zero3"),
        ("class token", "zero3"),
        ("transformers", "zero3"),
        ("transformers", "ddp"),
        ("transformers", "fsdp"),
    ],
)
def test_gradients_are_those_of_one_process(tmp_path: Path, kind: str, engine: EngineName) -> None:
    fields = _fields(kind, tmp_path)
    expected = _whole_batch_gradients(fields)
    for found in run_ranks(_gradients, 2, engine, fields, 2, group=False):
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            difference = (found[name] - gradient).norm()
            assert difference <= 1e-5 * max(float(gradient.norm()), 1e-2), name
