"""Training of a decoder on texts alone: a loop over the whole batch in one process, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.ranks import run_ranks
from tests.vlm.model.tiny import TEXT, VIT, perturb
from vlm.batch import Batch, Texts
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.model.captioner import CaptionDecoder, NextToken
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.objectives.counter_rng import below, normals, numbered, words
from vlm.objectives.objective import Objective
from vlm.objectives.terms.caption import Caption
from vlm.training.accumulation import accumulate
from vlm.training.assembly import assemble, build_objective
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.registry import EngineName
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.rehearsal import Brought, rehearse

CAPTIONS = [["red", "a dog"], ["two small cats"], ["one", "a long street at night", "blue"], ["x y"], ["we see a hat"]]
ROWS, STEP, SEED, DIM, SIGMA = len(CAPTIONS), 3, 11, 24, 0.2
IDS = [40, -7, 2**61, 3, 12]


def small_model(*, double: bool, lock: str | None = "all") -> DualEncoder:
    towers = {"embed_dim": DIM, "image": {"vision_cfg": VIT}, "text": {"text_cfg": TEXT}}
    gap = {"noise": SIGMA, "correction": "none"}
    captioner = {"pooler": "embedding", "layers": 1, "heads": 2, "gap": gap}
    fields = {"towers": towers, "captioner": captioner, "lock": {"image": lock, "text": lock}}
    model = build_model(ModelConfig.model_validate(fields))
    perturb(model)
    model.image.register_forward_pre_hook(lambda *_: pytest.fail("an image is computed"))
    return model.double() if double else model


def rows_of(model: DualEncoder, rows: range) -> Batch:
    """These samples, without images."""
    texts = [text for row in rows for text in CAPTIONS[row]]
    owners = torch.tensor([row - rows.start for row in rows for _ in CAPTIONS[row]])
    return Batch(
        step=STEP,
        sample_ids=torch.tensor([IDS[row] for row in rows]),
        keys=tuple(str(row) for row in rows),
        parts={
            "text": Texts(*model.tokenizer([CAPTIONS[row][0] for row in rows])),
            "captions": Texts(*model.tokenizer(texts), owners=owners),
        },
    )


def config(**term: Any) -> TrainingConfig:
    caption = {"sight": "text", "label_smoothing": 0.1, **term}
    return TrainingConfig.model_validate({"global_batch": ROWS, "seed": SEED, "objective": {"caption": caption}})


def stand_in(row: int, place: int, other: bool) -> tuple[str, Tensor]:
    """The caption that is shown for a sample's caption at this place, and the noise on its embedding."""
    key = numbered(words(SEED, STEP, torch.tensor([IDS[row]]), "stand-in"), torch.tensor([place]))
    noise, several = normals(key, DIM, "noise")[0], CAPTIONS[row]
    if other and len(several) > 1:
        others = [*several[place + 1 :], *several[:place]]
        return others[int(below(key, torch.tensor([len(others)]), "other"))], noise
    return several[place], noise


def one_process(model: DualEncoder, captions: str, other: bool) -> dict[str, Tensor]:
    """The definition: caption after caption, all logits, one graph."""
    model.train()
    assert isinstance(model.decoder, CaptionDecoder)
    assert model.embedding_tokens is not None
    linear, told = model.embedding_tokens.projection, []
    for row, several in enumerate(CAPTIONS):
        for place, text in enumerate(several if captions == "all" else several[:1]):
            shown, noise = stand_in(row, place, other)
            with torch.no_grad():
                embedding = normalize(model.encode_text(*model.tokenizer([shown]))[0] + SIGMA * noise, dim=0)
            tokens = (linear.weight @ embedding + linear.bias).reshape(1, 4, -1)
            ids, lengths = model.tokenizer([text])
            states: Any = model.text(ids, lengths)
            made = model.decoder(states.tokens, tokens)
            assert isinstance(made, NextToken)
            log_p = torch.log_softmax(made.states[0] @ model.decoder.vocabulary.weight, 1)[:-1]
            right = log_p.gather(1, ids[0, 1:, None])[:, 0]
            told.append(-0.9 * right - 0.1 * log_p.mean(1))
    caption = torch.cat(told).mean()
    caption.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"caption": caption.detach(), **gradients}


def accumulated(
    engine_name: EngineName, world_size: int, rows: int | None, captions: str, other: bool
) -> dict[str, Tensor]:
    settings = EngineSettings(engine_name, -(-ROWS // world_size), max_grad_norm=None)
    accelerator = start_accelerator(settings)
    world = World.current(accelerator.device)
    model = small_model(double=True)
    training = config(captions=captions, stand_in="other" if other else "same")
    objective = build_objective(training, model, ROWS, world)
    state = assemble(training, settings, accelerator, model, objective)
    engine = state.engine
    engine.module.train()
    local = range(world.rank * ROWS // world_size, (world.rank + 1) * ROWS // world_size)
    batch = rows_of(model, local)
    engine.warm_up(batch, objective.needs.outputs)
    result = accumulate(engine, objective, batch, MicroBatchPlan(ROWS, world_size, rows), SEED)
    gradients = {name: engine.gradient(name).clone() for name in engine.parameters()}
    terms = {name: world.sum(part) / world_size for name, part in result.terms.items()}
    engine.accelerator.end_training()
    assert not gradients.pop("logit_scale").any()
    return {**terms, **gradients}


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert {name.partition(".")[0] for name in found} == {"caption", "decoder", "embedding_tokens"}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(("captions", "other"), [("one", False), ("all", False), ("all", True)])
def test_it_is_the_mean_over_all_tokens_of_captions_told_from_noised_texts(captions: str, other: bool) -> None:
    expected = one_process(small_model(double=True), captions, other)
    for rows in (None, 2):
        require_equal(accumulated("ddp", 1, rows, captions, other), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rows"), [("ddp", 1), pytest.param("fsdp", 2, marks=pytest.mark.long)])
def test_three_uneven_ranks_are_one_process_in_float64(engine: EngineName, rows: int) -> None:
    expected = one_process(small_model(double=True), "all", True)
    for found in run_ranks(accumulated, 3, engine, 3, rows, "all", True, group=False):
        require_equal(found, expected)


def test_another_caption_is_drawn_evenly_and_anew_at_each_step() -> None:
    term, count = Caption(sight="text", captions="all", stand_in="other"), 3000
    owners = torch.arange(count).repeat_interleave(4)
    texts = Texts(torch.zeros(4 * count, 3, dtype=torch.long), torch.full((4 * count,), 3), owners=owners)

    def chosen(step: int) -> Tensor:
        batch = Batch(step, torch.arange(count), tuple(map(str, range(count))), {"captions": texts})
        part: Any = term.adds(batch, SEED)["captions_stand_ins"]
        places: Tensor = torch.arange(4 * count) + part.offsets
        assert torch.equal(owners[places], owners)
        assert (part.offsets != 0).all()
        return places % 4

    first, second = chosen(0), chosen(1)
    for place in range(4):
        shares = torch.bincount(first[place::4], minlength=4) / count
        assert shares[place] == 0
        assert [*shares[:place], *shares[place + 1 :]] == pytest.approx([1 / 3] * 3, abs=0.04)
    assert (first == second).double().mean() == pytest.approx(1 / 3, abs=0.02)


def test_what_does_not_go_together_is_one_line() -> None:
    def refused(model: DualEncoder, message: str, images: bool = False, **terms: Any) -> None:
        training = TrainingConfig.model_validate({"global_batch": ROWS, "objective": terms})
        with pytest.raises(ValueError, match=message) as caught:
            rehearse(
                model,
                training.objective,
                training.providers,
                training.similarity,
                num_pairs=4,
                brought=Brought(images=images),
            )
        assert "\n" not in str(caught.value)

    model = build_model(small_model(double=False).config)
    refused(model, r"^objective\.clip: it reads images, and the data brings none; set data\.images to true", clip=1.0)
    refused(model, r"^objective\.caption: it reads images, and the data brings none", caption=1.0)
    refused(model, r"^objective\.caption: the batch brings no captions", caption={"sight": "text", "captions": "all"})
    towers = model.config.model_copy(update={"captioner": None})
    refused(build_model(towers), r"^objective\.caption: the model has no captioning decoder", caption={"sight": "text"})
    pooled = model.config.model_dump(mode="json") | {"captioner": {"layers": 1, "heads": 2, "pooler_heads": 2}}
    refused(
        build_model(ModelConfig.model_validate(pooled)),
        r"^objective\.caption\.sight: found text; the decoder looks at no embedding; set model\.captioner\.pooler",
        caption={"sight": "text"},
    )
    with pytest.raises(ValueError, match="captions: all"):
        Caption(sight="text", stand_in="other")
    with pytest.raises(ValueError, match="stand_in: found 'other', which means nothing with sight: image"):
        Caption(captions="all", stand_in="other")


def test_without_such_a_term_nothing_is_added() -> None:
    training = TrainingConfig.model_validate({"global_batch": ROWS, "objective": {"clip": 1.0, "caption": 1.0}})
    batch = rows_of(small_model(double=False), range(ROWS))
    assert Objective(training.objective).prepared(batch) is batch
