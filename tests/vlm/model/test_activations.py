"""Activation checkpointing: the same gradient bit for bit as without, under dropout and in micro-batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.model.hugging_face import save_language_model, save_text_model, save_vision_model
from tests.vlm.model.tiny import TEXT, TEXTS, VIT, some_images
from vlm.batch import Batch, Images, Texts
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.model.activations import checkpoint_activations
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.training.accumulation import accumulate
from vlm.training.assembly import assemble, build_objective
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.registry import EngineName
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan

ROWS = len(TEXTS)
BOTH = ["image", "text"]
CAPTIONER = {"layers": 2, "heads": 2, "queries": 5, "pooler_heads": 2}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}


def fields_of(kind: str, folder: Path) -> dict[str, Any]:
    image: dict[str, Any] = {"vision_cfg": {**VIT, "patch_dropout": 0.5}}
    text: dict[str, Any] = {"text_cfg": TEXT}
    more: dict[str, Any] = {}
    if kind == "timm":
        image = {"vision_cfg": {**TIMM, "timm_drop_path": 0.5}}
        more = {"lock": {"text": {"all_but": 1}}}
    if kind == "transformers":
        save_vision_model(folder / "image", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
        save_text_model(folder / "text")
        image = {"transformers": str(folder / "image"), "pool": "first"}
        text = {"transformers": str(folder / "text"), "context_length": 16}
        more = {"lock": {"image": {"all_but": 1}}}
    if kind == "captioner":
        more = {"captioner": CAPTIONER}
    if kind == "language model":
        save_language_model(folder / "text", resid_pdrop=0.5, attn_pdrop=0.5)
        text = {"transformers": str(folder / "text"), "pool": "query", "context_length": 16}
        more = {"captioner": {"heads": 2, "queries": 5, "pooler_heads": 2, "language_model": {"train": "all"}}}
    return {"towers": {"embed_dim": 24, "image": image, "text": text}, **more}


def made(fields: dict[str, Any]) -> DualEncoder:
    return build_model(ModelConfig.model_validate(fields), seed=1)


def batch_of(model: DualEncoder) -> Batch:
    size = model.image_spec.size
    return Batch(
        step=3,
        sample_ids=torch.arange(ROWS),
        keys=tuple(TEXTS),
        parts={"image": Images(some_images(ROWS, size)), "text": Texts(*model.tokenizer(TEXTS))},
    )


def step_of(fields: dict[str, Any], parts: list[str], rows: int | None, precision: Any) -> dict[str, Tensor]:
    """The loss and the gradients of a step."""
    settings = EngineSettings("ddp", ROWS, precision)
    terms = {"clip": 1.0, **({"caption": 1.0} if "captioner" in fields else {})}
    config = TrainingConfig.model_validate(
        {"global_batch": ROWS, "objective": terms, "activation_checkpointing": parts}
    )
    accelerator, model = start_accelerator(settings), made(fields)
    objective = build_objective(config, model, ROWS, World())
    engine = assemble(config, settings, accelerator, model, objective).engine
    engine.module.train()
    loss = accumulate(engine, objective, batch_of(model), MicroBatchPlan(ROWS, 1, rows), seed=0).loss
    gradients = {name: engine.gradient(name) for name in engine.parameters()}
    accelerator.end_training()
    return {"loss": loss, **gradients}


@pytest.mark.parametrize(
    ("kind", "rows", "precision"),
    [
        ("open_clip", None, "fp32"),
        ("open_clip", 3, "bf16"),
        ("timm", 2, "fp32"),
        ("transformers", 2, "fp32"),
        ("captioner", 2, "fp32"),
        ("language model", 2, "fp32"),
    ],
)
def test_gradients_are_the_same_bit_for_bit(tmp_path: Path, kind: str, rows: int | None, precision: str) -> None:
    fields = fields_of(kind, tmp_path)
    parts = [*BOTH, "captioner"] if "captioner" in fields else BOTH
    expected, found = (step_of(fields, chosen, rows, precision) for chosen in ([], parts))
    assert expected.keys() == found.keys()
    assert any("blocks" in name or "layer" in name for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def on_ranks(engine_name: EngineName, fields: dict[str, Any], ways: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """The gradients of a second step, when DeepSpeed knows the order of modules, for each of some ways of training."""
    terms = {"clip": 1.0, **({"caption": 1.0} if "captioner" in fields else {})}
    config = [TrainingConfig.model_validate({"global_batch": ROWS, "objective": terms, **way}) for way in ways]
    settings = [EngineSettings(engine_name, ROWS // 2, options=training.engine_options) for training in config]
    accelerator, made_gradients = start_accelerator(settings[0]), []
    world = World.current(accelerator.device)
    for training, how in zip(config, settings, strict=True):
        model = made(fields)
        objective = build_objective(training, model, ROWS, world)
        engine = assemble(training, how, accelerator, model, objective).engine
        engine.module.train()
        batch = batch_of(model).take(world.rank * ROWS // 2, (world.rank + 1) * ROWS // 2)
        for _ in range(2):
            accumulate(engine, objective, batch, MicroBatchPlan(ROWS, 2, 1), seed=0)
            gradients = {name: engine.gradient(name).clone() for name in engine.parameters()}
            engine.step(1e-3)
        made_gradients.append(gradients)
    return made_gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "kind", "options"),
    [("fsdp", "transformers", {"prefetch": 2}), pytest.param("zero3", "language model", {}, marks=pytest.mark.long)],
)
def test_they_are_so_where_blocks_are_sharded(
    tmp_path: Path, engine: EngineName, kind: str, options: dict[str, Any]
) -> None:
    fields = fields_of(kind, tmp_path)
    parts = [*BOTH, "captioner"] if "captioner" in fields else BOTH
    checkpointed = {"activation_checkpointing": parts, "engine_options": options}
    for expected, found in run_ranks(on_ranks, 2, engine, fields, [{}, checkpointed], group=False):
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def kept(model: DualEncoder) -> int:
    """Values that autograd keeps of a forward of images, for its backward."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.image(some_images(ROWS))
    return sum(sizes)


def test_blocks_keep_their_input_alone_and_compute_once_without_a_gradient() -> None:
    model = made(fields_of("open_clip", Path()))
    calls: list[str] = []
    for block in model.image.blocks():
        block.get_submodule("ln_2").register_forward_hook(lambda *_: calls.append("block"))
    before = kept(model)
    checkpoint_activations(model, ["image", "image"])
    tokens = 16 // 2 + 1
    blocks = len(model.image.blocks())
    width = 32
    assert kept(model) <= before - blocks * ROWS * tokens * width * 8  # attention and MLP keep far more than 8 rows
    calls.clear()
    model.image(some_images(ROWS)).sum().backward()
    assert len(calls) == 2 * blocks
    calls.clear()
    with torch.no_grad():
        model.image(some_images(ROWS))
    assert len(calls) == blocks


def test_a_part_that_is_not_there_is_one_line() -> None:
    model = made(fields_of("open_clip", Path()))
    with pytest.raises(EveryRankError, match=r"found captioner, and the model has none .*; choose from: image, text"):
        checkpoint_activations(model, ["captioner"])
    bag = made({"towers": {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": {"text_cfg": TEXT}}})
    bag.text.blocks = list  # type: ignore[method-assign]
    with pytest.raises(EveryRankError, match="found text, which repeats no blocks; leave it out"):
        checkpoint_activations(bag, ["text"])
