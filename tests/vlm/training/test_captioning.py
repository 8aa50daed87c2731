"""The captioning term with the contrastive one on a real model: plain logits of the whole batch in one process."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.ranks import run_ranks
from tests.vlm.model.hugging_face import save_language_model
from tests.vlm.model.tiny import TEXT, VIT, perturb, some_images
from vlm.batch import Batch, Images, Texts
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.model.captioner import NextToken
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.training.accumulation import accumulate
from vlm.training.assembly import assemble, build_objective
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.registry import EngineName
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.step import train_step

WORDS = [
    "red",
    "a dog",
    "two small cats on a wet table",
    "one",
    "a photo of the very long street at night",
    "blue",
    "x y",
]
OWNERS = [0, 0, 1, 2, 2, 2, 3, 4, 5, 6]
ROWS, SMOOTHING, WEIGHT = len(WORDS), 0.1, 2.0


def small_model(*, double: bool, pooler: str = "cascade", class_token: bool = True) -> DualEncoder:
    text = {**TEXT, "vocab_size": 49408, **({"embed_cls": True, "correct_cls_mask": True} if class_token else {})}
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": {"text_cfg": text}}
    captioner = {"layers": 2, "heads": 2, "queries": 5, "pooler_heads": 2, "pooler": pooler}
    model = build_model(ModelConfig.model_validate({"towers": towers, "captioner": captioner}))
    perturb(model)
    return model.double() if double else model


def split_model(*, double: bool, kind: str, train: str) -> DualEncoder:
    """A language model that is split, with open gates; of kinds that leave float64 as it is."""
    captioner = {"heads": 2, "queries": 5, "pooler_heads": 2, "pooler": "single", "language_model": {"train": train}}
    with tempfile.TemporaryDirectory() as folder:
        save_language_model(Path(folder), kind, weights=False)  # of several ranks the library lets one alone save them
        text = {"transformers": folder, "pretrained": False, "pool": "query", "context_length": 16}
        towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": text}
        model = build_model(ModelConfig.model_validate({"towers": towers, "captioner": captioner}))
    perturb(model)
    return model.double() if double else model


def made_model(options: dict[str, Any]) -> DualEncoder:
    return split_model(**options) if "kind" in options else small_model(**options)


def rows_of(model: DualEncoder, rows: range) -> Batch:
    """These rows of the batch; the texts are as long as the longest of them."""
    captions = [f"{WORDS[owner]} {number}" for number, owner in enumerate(OWNERS)]
    chosen = [number for number, owner in enumerate(OWNERS) if owner in rows]
    several = model.tokenizer([captions[number] for number in chosen])
    first = model.tokenizer([captions[OWNERS.index(owner)] for owner in rows])
    owners = torch.tensor([OWNERS[number] - rows.start for number in chosen])
    return Batch(
        step=3,
        sample_ids=torch.arange(rows.start, rows.stop),
        keys=tuple(WORDS[row] for row in rows),
        parts={
            "image": Images(some_images(ROWS)[rows.start : rows.stop]),
            "text": Texts(*first),
            "captions": Texts(*several, owners=owners),
        },
    )


def config(captions: str = "one", weight: float = WEIGHT) -> TrainingConfig:
    caption = {"weight": weight, "label_smoothing": SMOOTHING, "captions": captions}
    return TrainingConfig.model_validate({"global_batch": ROWS, "objective": {"clip": 1.0, "caption": caption}})


def one_process(model: DualEncoder, captions: str, weights: tuple[float, float] = (1.0, WEIGHT)) -> dict[str, Tensor]:
    """The definition: logits of all tokens, torch's own losses, one graph."""
    model.train()
    batch = rows_of(model, range(ROWS))
    assert model.decoder is not None
    image, image_tokens = model._encode_image(batch.pixels)
    text = model.encode_text(batch.texts.tokens, batch.texts.lengths)
    logits = model.logit_scale.exp() * image @ text.T
    pairs = torch.arange(ROWS)
    clip = (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2
    told = batch.texts if captions == "one" else batch.parts["captions"]
    assert isinstance(told, Texts)
    assert image_tokens is not None
    states = model.text(told.tokens, told.lengths).tokens
    shown = image_tokens if told.owners is None else image_tokens[told.owners]
    made = model.decoder(states, shown)
    assert isinstance(made, NextToken)
    scores = made.states @ model.decoder.vocabulary.weight
    length = told.tokens.shape[1]
    labels = told.tokens.masked_fill(torch.arange(length) >= told.lengths[:, None], -100)
    caption = cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=SMOOTHING)
    (weights[0] * clip + weights[1] * caption).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"clip": clip.detach(), "caption": caption.detach(), **gradients}


def accumulated(
    engine_name: EngineName, world_size: int, rows: int | None, captions: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    settings = EngineSettings(engine_name, -(-ROWS // world_size), max_grad_norm=None)
    accelerator = start_accelerator(settings)
    world = World.current(accelerator.device)
    model = made_model(options)
    objective = build_objective(config(captions), model, ROWS, world)
    state = assemble(config(captions), settings, accelerator, model, objective)
    engine = state.engine
    engine.module.train()
    local = range(world.rank * ROWS // world_size, (world.rank + 1) * ROWS // world_size)
    batch = rows_of(model, local)
    engine.warm_up(batch, objective.needs.outputs)
    result = accumulate(engine, objective, batch, MicroBatchPlan(ROWS, world_size, rows), seed=0)
    gradients = {name: engine.gradient(name).clone() for name in engine.parameters()}
    terms = {name: world.sum(part) / world_size for name, part in result.terms.items()}
    engine.accelerator.end_training()
    return {**terms, **gradients}


@pytest.mark.parametrize("rows", [None, 1, 3, 5])
@pytest.mark.parametrize(
    ("captions", "pooler"), [("one", "cascade"), ("all", "parallel"), ("one", "single"), ("all", "tower")]
)
def test_it_is_the_mean_over_all_tokens_in_float64(rows: int | None, captions: str, pooler: str) -> None:
    options = {"double": True, "pooler": pooler, "class_token": pooler != "single"}
    expected = one_process(small_model(**options), captions)  # type: ignore[arg-type]
    found = accumulated("ddp", 1, rows, captions, options)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(("kind", "train"), [("gpt2", "all"), ("opt", "lora")])
def test_a_language_models_is_too(kind: str, train: str) -> None:
    options = {"double": True, "kind": kind, "train": train}
    expected = one_process(made_model(options), "all")
    assert any("lora_A" in name for name in expected) == (train == "lora")
    assert ("decoder.vocabulary.weight" in expected) == (train == "all")
    found = accumulated("ddp", 1, 3, "all", options)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world_size", "rows", "options"),
    [
        pytest.param("ddp", 3, None, {}, marks=pytest.mark.long),
        ("ddp", 3, 1, {}),
        ("fsdp", 3, 2, {}),
        ("fsdp", 3, 2, {"kind": "gpt2", "train": "lora"}),
    ],
)
def test_three_uneven_ranks_are_one_process_in_float64(
    engine: EngineName, world_size: int, rows: int | None, options: dict[str, Any]
) -> None:
    options = {"double": True, **options}
    expected = one_process(made_model(options), "all")
    for found in run_ranks(accumulated, world_size, engine, world_size, rows, "all", options, group=False):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "rows", "options"),
    [("zero2", 2, {}), ("zero3", None, {}), ("zero3", 2, {"kind": "gpt2", "train": "lora"})],
)
def test_deepspeed_computes_the_same(engine: EngineName, rows: int | None, options: dict[str, Any]) -> None:
    """It refuses float64: rounding of fp32 around the values in float64."""
    expected = one_process(made_model({"double": True, **options}), "one")
    for found in run_ranks(accumulated, 2, engine, 2, rows, "one", {"double": False, **options}, group=False):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.linalg.norm(found[name].double() - tensor) <= 1e-5 * torch.linalg.norm(tensor), name


def test_the_gradient_is_the_weighted_sum_of_both_terms() -> None:
    together = one_process(small_model(double=True), "one")
    clip = one_process(small_model(double=True), "one", (1.0, 0.0))
    caption = one_process(small_model(double=True), "one", (0.0, 1.0))
    found = accumulated("ddp", 1, 3, "one", {"double": True})
    for name in together.keys() - {"clip", "caption"}:
        torch.testing.assert_close(found[name], clip[name] + WEIGHT * caption[name], rtol=1e-10, atol=1e-12, msg=name)


def without_captions(engine_name: EngineName, world_size: int) -> list[str]:
    """Two steps with the captioning term at weight 0; the decoder's parameters that train."""
    settings = EngineSettings(engine_name, -(-ROWS // world_size))
    accelerator = start_accelerator(settings)
    world = World.current(accelerator.device)
    model, training = small_model(double=False), config(weight=0.0)
    objective = build_objective(training, model, ROWS, world)
    assert objective.needs.outputs == {"image", "text"}
    state = assemble(training, settings, accelerator, model, objective)

    def refuse(*_: Any) -> None:
        raise AssertionError("the decoder is computed")

    assert model.decoder is not None
    model.decoder.register_forward_pre_hook(refuse)
    batch = rows_of(model, range(world.rank * ROWS // world_size, (world.rank + 1) * ROWS // world_size))
    state.engine.warm_up(batch, objective.needs.outputs)
    for _ in range(2):
        train_step(state, batch, MicroBatchPlan(ROWS, world_size), 0, 1e-3)
    state.engine.accelerator.end_training()
    return [name for name in state.engine.parameters() if name.startswith("decoder.")]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2)])
def test_at_weight_0_the_decoder_is_not_computed_and_no_engine_waits_for_it(
    engine: EngineName, world_size: int
) -> None:
    assert run_ranks(without_captions, world_size, engine, world_size, group=False) == [[]] * world_size
