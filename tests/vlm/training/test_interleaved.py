"""The loss over interleaved documents on a real model: one image mask and one token at a time, in float64."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from tests.ranks import run_ranks
from tests.vlm.model.tiny import some_images
from tests.vlm.training.test_captioning import ROWS, rows_of, small_model
from vlm.batch import DOCUMENT_IMAGES, DOCUMENTS, Batch, Documents, Images, Texts
from vlm.distributed.world import World
from vlm.model.captioner import CaptionDecoder
from vlm.model.dual_encoder import DualEncoder
from vlm.outputs import PAIR
from vlm.training.accumulation import accumulate
from vlm.training.assembly import assemble, build_objective
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.registry import EngineName
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan

SMOOTHING, WEIGHT, CAPTION_WEIGHT = 0.1, 1.5, 0.5


class Document(NamedTuple):
    """A document as it is told: its tokens, how many images stand before each of them, and which are not counted."""

    owner: int
    tokens: list[int]
    before: list[int]
    untold: tuple[int, ...] = ()


BEGIN, END = 49406, 49407
# Samples 0 to 2 have none, and on three ranks of two, two and three samples the first has no document.
DOCUMENTS_OF_ALL = [
    Document(2, [BEGIN, 320, 1929, 537, 320, 2368, END], [0, 1, 1, 1, 2, 2, 2]),
    Document(2, [BEGIN, 736, 533, END], [0, 0, 0, 0]),
    Document(4, [BEGIN, 320, 1929, END], [0, 0, 1, 1]),
    Document(4, [BEGIN, 271, 736, 271, 533, 1929, 320, 271, 537, END], [0, 1, 1, 2, 2, 2, 2, 3, 3, 3], (1, 3, 7)),
    Document(6, [BEGIN, 320, END], [0, 1, 1]),
]


def images_of(document: Document) -> int:
    return document.before[-1]


def all_images() -> Tensor:
    return some_images(ROWS + sum(map(images_of, DOCUMENTS_OF_ALL)))[ROWS:]


def documents_part(documents: list[Document], first_sample: int, seen: str) -> Documents:
    length = max((len(one.tokens) for one in documents), default=2)
    shape = (len(documents), length)
    tokens, told = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    seen_from, seen_to = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, one in enumerate(documents):
        tokens[row, : len(one.tokens)] = torch.tensor(one.tokens)
        for place in range(len(one.tokens) - 1):
            told[row, place + 1] = place + 1 not in one.untold
            seen_to[row, place] = one.before[place + 1]
            seen_from[row, place] = max(0, one.before[place + 1] - 1) if seen == "last" else 0
    return Documents(
        tokens,
        torch.tensor([len(one.tokens) for one in documents], dtype=torch.long),
        told=told,
        seen_from=seen_from,
        seen_to=seen_to,
        num_images=torch.tensor([images_of(one) for one in documents], dtype=torch.long),
        owners=torch.tensor([one.owner - first_sample for one in documents], dtype=torch.long),
    )


def batch_of(model: DualEncoder, rows: range, seen: str) -> Batch:
    pairs = rows_of(model, rows)
    owners = torch.tensor([one.owner for one in DOCUMENTS_OF_ALL for _ in range(images_of(one))])
    chosen = (owners >= rows.start) & (owners < rows.stop)
    here = [one for one in DOCUMENTS_OF_ALL if one.owner in rows]
    parts = {
        "image": pairs.parts["image"],
        "text": pairs.parts["text"],
        DOCUMENTS: documents_part(here, rows.start, seen),
        DOCUMENT_IMAGES: Images(all_images()[chosen], owners=owners[chosen] - rows.start),
    }
    return Batch(3, pairs.sample_ids, pairs.keys, parts)


def config(terms: dict[str, Any]) -> TrainingConfig:
    return TrainingConfig.model_validate({"global_batch": ROWS, "objective": terms})


ALL_TERMS = {
    "clip": 1.0,
    "caption": CAPTION_WEIGHT,
    "interleaved": {"weight": WEIGHT, "label_smoothing": SMOOTHING},
}
NO_CAPTION = {name: ALL_TERMS[name] for name in ("clip", "interleaved")}


def token_by_token(model: DualEncoder, seen: str) -> list[tuple[Tensor, int]]:
    """log p over the vocabulary of each token that is told, each from a forward of its own beginning and images.

    A decoder without a mask is shown, layer by layer, what each token sees.
    """
    model.train()
    assert isinstance(model.decoder, CaptionDecoder)
    told, images = [], list(all_images())
    for document in DOCUMENTS_OF_ALL:
        own, images = images[: images_of(document)], images[images_of(document) :]
        shown = [model.encode_image_and_tokens(image[None])[1] for image in own]
        ids = torch.tensor([document.tokens])
        states = model.text(ids, torch.tensor([ids.shape[1]])).tokens
        for place in range(1, len(document.tokens)):
            if place not in document.untold:
                told.append((_log_p(model.decoder, states[:, :place], document, shown, seen), document.tokens[place]))
    return told


def _log_p(decoder: CaptionDecoder, states: Tensor, document: Document, shown: list[Tensor], seen: str) -> Tensor:
    x = decoder.state_projection(states)
    cross: Any
    for block, cross in zip(decoder.resblocks, decoder.cross_attn, strict=True):
        x = block(x, causal=True)
        rows = []
        for place in range(x.shape[1]):
            row, count = x[:, place : place + 1], document.before[place + 1]
            if count:
                visible = shown[count - 1 : count] if seen == "last" else shown[:count]
                rows.append(cross(row, decoder.image_projection(torch.cat(visible, 1))))
            else:
                rows.append(row + cross.ls_2(cross.mlp(cross.ln_2(row))))
        x = torch.cat(rows, 1)
    return log_softmax(decoder.ln_final(x)[0, -1] @ decoder.vocabulary.weight, 0)


def one_process(model: DualEncoder, seen: str, terms: dict[str, Any]) -> dict[str, Tensor]:
    """The definition, in one graph of loops."""
    losses = [
        -(1 - SMOOTHING) * log_p[label] - SMOOTHING * log_p.mean() for log_p, label in token_by_token(model, seen)
    ]
    values = {"interleaved": torch.stack(losses).mean()}
    batch = rows_of(model, range(ROWS))
    image = model.encode_image(batch.pixels)
    text = model.encode_text(batch.texts.tokens, batch.texts.lengths)
    logits, pairs = model.logit_scale.exp() * image @ text.T, torch.arange(ROWS)
    values["clip"] = (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2
    if "caption" in terms:
        told = model({"image": batch.parts["image"], "text": batch.texts}, PAIR | {"text_likelihood"})
        values["caption"] = -told["text_likelihood"][:, 0].mean()
    weights = {"clip": 1.0, "caption": CAPTION_WEIGHT, "interleaved": WEIGHT}
    total = sum((weights[name] * value for name, value in values.items()), torch.zeros(()))
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: value.detach() for name, value in values.items()}, **gradients}


def accumulated(
    engine_name: EngineName, world_size: int, rows: int | None, seen: str, terms: dict[str, Any], double: bool
) -> dict[str, Tensor]:
    settings = EngineSettings(engine_name, -(-ROWS // world_size), max_grad_norm=None)
    accelerator = start_accelerator(settings)
    world = World.current(accelerator.device)
    model = small_model(double=double)
    objective = build_objective(config(terms), model, ROWS, world)
    state = assemble(config(terms), settings, accelerator, model, objective)
    engine = state.engine
    engine.module.train()
    local = range(world.rank * ROWS // world_size, (world.rank + 1) * ROWS // world_size)
    batch = batch_of(model, local, seen)
    engine.warm_up(batch, objective.needs.outputs)
    result = accumulate(engine, objective, batch, MicroBatchPlan(ROWS, world_size, rows), seed=0)
    gradients = {name: engine.gradient(name).clone() for name in engine.parameters()}
    values = {name: world.sum(part) / world_size for name, part in result.terms.items()}
    engine.accelerator.end_training()
    return {**values, **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    return {seen: one_process(small_model(double=True), seen, ALL_TERMS) for seen in ("last", "all")}


@pytest.mark.parametrize(("rows", "seen"), [(None, "last"), (None, "all"), (1, "all"), (3, "last"), (5, "all")])
def test_it_is_the_mean_over_all_told_tokens_in_float64(
    expected: dict[str, dict[str, Tensor]], rows: int | None, seen: str
) -> None:
    assert_same(accumulated("ddp", 1, rows, seen, ALL_TERMS, True), expected[seen])


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rows", "terms"), [("ddp", 1, NO_CAPTION), ("fsdp", 2, ALL_TERMS)])
def test_three_ranks_of_which_one_has_no_document_are_one_process_in_float64(
    engine: EngineName, rows: int | None, terms: dict[str, Any]
) -> None:
    """Without the caption term too, where nothing else reaches the decoder."""
    expected = one_process(small_model(double=True), "last", terms)
    for found in run_ranks(accumulated, 3, engine, 3, rows, "last", terms, True, group=False):
        assert_same(found, expected)


@pytest.mark.long
def test_deepspeed_computes_the_same(expected: dict[str, dict[str, Tensor]]) -> None:
    """It refuses float64: rounding of fp32 around the values in float64."""
    for found in run_ranks(accumulated, 3, "zero3", 3, None, "last", ALL_TERMS, False, group=False):
        assert found.keys() == expected["last"].keys()
        for name, tensor in expected["last"].items():
            assert torch.linalg.norm(found[name].double() - tensor) <= 1e-5 * torch.linalg.norm(tensor), name


def likelihood(model: DualEncoder, documents: Documents, pixels: Tensor) -> list[Tensor]:
    """log p of the tokens of each document, and the mean of log p over the vocabulary."""
    pair = rows_of(model, range(1)).parts
    images = Images(pixels, owners=torch.zeros(len(pixels), dtype=torch.long))
    inputs = {"image": pair["image"], "text": pair["text"], DOCUMENTS: documents, DOCUMENT_IMAGES: images}
    made = model(inputs, PAIR | {"documents_likelihood"})["documents_likelihood"]
    return list(made.split((documents.lengths - 1).tolist()))


@pytest.mark.parametrize("seen", ["last", "all"])
@torch.no_grad()
def test_an_image_with_all_text_behind_it_is_a_pair(seen: str) -> None:
    model = small_model(double=True).eval()
    pairs = rows_of(model, range(ROWS))
    texts = pairs.texts
    documents = [
        Document(0, row[:length].tolist(), [0, *[1] * (int(length) - 1)])
        for row, length in zip(texts.tokens, texts.lengths, strict=True)
    ]
    found = torch.cat(likelihood(model, documents_part(documents, 0, seen), pairs.pixels))
    expected = model({"image": pairs.parts["image"], "text": texts}, PAIR | {"text_likelihood"})["text_likelihood"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("seen", "layers"), [("last", 1), ("all", 1), ("last", 2)])
@torch.no_grad()
def test_what_an_image_and_a_token_change(seen: str, layers: int) -> None:
    """Nothing before them; with `last` and one layer an image changes nothing behind the next image either.

    With more layers, tokens behind the next image see it through those that saw it.
    """
    model = small_model(double=True).eval()
    assert isinstance(model.decoder, CaptionDecoder)
    for name in ("resblocks", "cross_attn"):
        setattr(model.decoder, name, getattr(model.decoder, name)[:layers])
    document = DOCUMENTS_OF_ALL[3]
    part, pixels = documents_part([document], 0, seen), all_images()[3:6]
    (before,) = likelihood(model, part, pixels)
    images_before = torch.tensor(document.before[1:])
    for image in range(3):
        changed = pixels.clone()
        changed[image] = 255 - changed[image]
        (after,) = likelihood(model, part, changed)
        is_same = (after == before).all(1)
        assert (
            is_same.tolist()
            == ((images_before <= image) | ((images_before > image + 1) & (seen == "last") & (layers == 1))).tolist()
        )
    for place in range(1, len(document.tokens) - 1):
        tokens = part.tokens.clone()
        tokens[0, place] = 1000
        (after,) = likelihood(model, documents_of(part, tokens), pixels)
        means = (after[:, 1] == before[:, 1]).tolist()  # of log p over the vocabulary, whatever the labels are
        assert means == [number < place for number in range(len(means))]


def documents_of(part: Documents, tokens: Tensor) -> Documents:
    return Documents(**{**part.__dict__, "tokens": tokens})


def test_a_document_without_a_told_token_and_a_step_without_documents_cost_nothing() -> None:
    model = small_model(double=True)
    objective = build_objective(config(NO_CAPTION), model, ROWS, World())
    batch = batch_of(model, range(2), "last")
    documents = batch.parts[DOCUMENTS]
    assert isinstance(documents, Documents)
    assert isinstance(batch.parts[DOCUMENT_IMAGES], Images)
    assert len(documents.lengths) == 0
    outputs = model(batch.parts, objective.needs.outputs)
    loss, terms = objective.evaluate(outputs, batch)
    assert float(terms["interleaved"]) == 0.0
    loss.backward()
    assert model.decoder is not None
    for parameter in model.decoder.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_the_logits_of_a_uniform_vocabulary_cost_its_logarithm() -> None:
    model = small_model(double=True)
    assert model.decoder is not None
    torch.nn.init.zeros_(model.decoder.vocabulary.weight)
    objective = build_objective(config(NO_CAPTION), model, ROWS, World())
    batch = batch_of(model, range(ROWS), "all")
    _, terms = objective.evaluate(model(batch.parts, objective.needs.outputs), batch)
    assert float(terms["interleaved"]) == pytest.approx(float(torch.tensor(49408.0).log()), rel=1e-6)
    assert isinstance(batch.texts, Texts)
