"""Rows of any kind: two kinds that are compared by contrast or by a term of pairs, on any number of uneven ranks."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.objectives.batches import batch_of, outputs_of, pair_terms
from tests.vlm.objectives.parity import UNEVEN, D, N, unit
from tests.vlm.objectives.small_blocks import small_blocks
from vlm.batch import Batch, BatchPart, Texts
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.objectives import functional
from vlm.objectives.contrast import contrast
from vlm.objectives.objective import Objective
from vlm.objectives.recipe import Providers, Terms
from vlm.objectives.registry import PROVIDERS, TERMS
from vlm.objectives.state import RunFacts
from vlm.objectives.step import PairStep, pair_step
from vlm.similarity.config import SimilarityConfig
from vlm.similarity.exchange import Exchange

# Sample i has so many captions, and audio or none.
NUM_CAPTIONS = torch.tensor([1, 2, 3, 1, 1, 4, 2, 1, 1, 2, 3])
HAS_AUDIO = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
IDS = torch.tensor([7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3])  # two samples are there twice
SCALE = 5.0


def fixture() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All rows by kind, as leaves in float64, and the samples that they are of."""
    generator = torch.Generator().manual_seed(2)
    owners = {
        "image": torch.arange(N),
        "captions": torch.arange(N).repeat_interleave(NUM_CAPTIONS),
        "audio": torch.arange(N)[HAS_AUDIO],
    }
    rows = {
        kind: unit(torch.randn(len(of), D, dtype=torch.float64, generator=generator)).requires_grad_()
        for kind, of in owners.items()
    }
    return rows, owners


def local_step(rows: dict[str, Tensor], owners: dict[str, Tensor], exchange: Exchange) -> PairStep:
    """This rank's part of the fixture."""
    world = exchange.world
    first = sum(UNEVEN[world.size][: world.rank])
    last = first + UNEVEN[world.size][world.rank]
    outputs = {"logit_scale": torch.tensor([SCALE], dtype=torch.float64)}
    parts: dict[str, BatchPart] = {}
    for kind, samples in owners.items():
        local = (samples >= first) & (samples < last)
        outputs[kind] = rows[kind][local]
        if kind != "image":
            count = int(local.sum())
            tokens, lengths = torch.zeros(count, 1, dtype=torch.int64), torch.ones(count, dtype=torch.int64)
            parts[kind] = Texts(tokens, lengths, owners=samples[local] - first)
    batch = Batch(0, IDS[first:last], tuple(map(str, range(first, last))), parts)
    return pair_step(outputs, batch, exchange, between=("image", "image"))


def dense(x: Tensor, y: Tensor, x_ids: Tensor, y_ids: Tensor) -> Tensor:
    """The definition, row by row."""
    total = torch.zeros((), dtype=torch.float64)
    for rows, columns, row_ids, column_ids in ((x, y, x_ids, y_ids), (y, x, y_ids, x_ids)):
        losses = []
        for i in range(len(rows)):
            logits = SCALE * rows[i] @ columns.T
            positive = column_ids == row_ids[i]
            losses.append(logits.logsumexp(0) - logits[positive].logsumexp(0) if positive.any() else rows[i, 0] * 0)
        total = total + torch.stack(losses).mean() / 2
    return total


def contrasted(kinds: tuple[str, str], similarity: dict[str, Any]) -> dict[str, Tensor]:
    """Value and gradients of contrast, averaged over the ranks."""
    world = World.current()
    rows, owners = fixture()
    step = local_step(rows, owners, Exchange(world, SimilarityConfig(**similarity)))
    with small_blocks() if world.size > 1 else nullcontext():
        value = contrast(step.rows(kinds[0]), step.rows(kinds[1]), step.logit_scale)
        value.backward()
    found = {"value": value.detach(), **{kind: rows[kind].grad for kind in kinds}}
    return {name: world.sum(tensor) / world.size for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("kinds", [("image", "captions"), ("image", "audio"), ("audio", "captions")], ids="-".join)
@pytest.mark.parametrize(
    ("world_size", "similarity"), [(1, {}), (3, {}), (3, {"exchange": "ring"})], ids=["one", "three", "ring of three"]
)
def test_contrast_is_the_dense_loss(kinds: tuple[str, str], world_size: int, similarity: dict[str, Any]) -> None:
    rows, owners = fixture()
    x, y = (rows[kind] for kind in kinds)
    expected = dense(x, y, *(IDS[owners[kind]] for kind in kinds))
    expected.backward()
    ranks = [contrasted(kinds, similarity)] if world_size == 1 else run_ranks(contrasted, 3, kinds, similarity)
    for found in ranks:
        torch.testing.assert_close(found["value"], expected.detach(), rtol=1e-12, atol=1e-12)
        for kind in kinds:
            torch.testing.assert_close(found[kind], rows[kind].grad, rtol=1e-10, atol=1e-12)


def clip_of_audio(similarity: dict[str, Any]) -> dict[str, Tensor]:
    """`clip` between images and audio, of the samples that have both, averaged over the ranks."""
    world = World.current()
    rows, owners = fixture()
    step = local_step(rows, owners, Exchange(world, SimilarityConfig(**similarity)))
    terms = TypeAdapter(Terms).validate_python({"sound": {"kind": "clip", "between": ["image", "audio"]}})
    with small_blocks() if world.size > 1 else nullcontext():
        value, by_term = Objective(terms, exchange=step.exchange).evaluate(step.outputs, step.batch)
        value.backward()
    assert list(by_term) == ["sound"]
    found = {"value": value.detach(), "image": rows["image"].grad, "audio": rows["audio"].grad}
    return {name: world.sum(tensor) / world.size for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize(
    ("world_size", "similarity"), [(1, {}), (3, {}), (3, {"exchange": "ring"})], ids=["one", "three", "ring of three"]
)
def test_a_term_between_other_kinds_compares_the_samples_that_have_both(
    world_size: int, similarity: dict[str, Any]
) -> None:
    rows, owners = fixture()
    x, y, ids = rows["image"][owners["audio"]], rows["audio"], IDS[owners["audio"]]
    logits = SCALE * x @ y.T
    others = ids[:, None] != ids[None, :]
    kept = torch.where(others | torch.eye(len(ids), dtype=torch.bool), logits, -torch.inf)
    expected = (kept.logsumexp(1) + kept.logsumexp(0) - 2 * logits.diagonal()).mean() / 2
    expected.backward()
    for found in [clip_of_audio(similarity)] if world_size == 1 else run_ranks(clip_of_audio, 3, similarity):
        torch.testing.assert_close(found["value"], expected.detach(), rtol=1e-12, atol=1e-12)
        for kind in ("image", "audio"):
            torch.testing.assert_close(found[kind], rows[kind].grad, rtol=1e-10, atol=1e-12)


# Options with which a term has something to do on a handful of pairs.
SMALL: dict[str, dict[str, Any]] = {
    "continuous": {"weights_from": "teacher_text"},
    "multi_head": {"heads": 2, "hardest": 3, "hidden": 4},
    "whitening": {"group_size": 2},
    "momentum_distillation": {"queue_size": 5, "ramp_epochs": 0},
    "multi_positive": {"by": "caption"},
    "group_excluded": {"by": "caption"},
    "individual_temperature": {"temperature_init": 0.2},
}


def value_and_gradients(
    name: str, between: tuple[str, str], outputs: dict[str, Tensor], teacher: dict[str, Tensor], batch: Batch
) -> dict[str, Tensor | None]:
    """A term between two kinds, with a queue of two steps where there is one."""
    recipe = {name: {**SMALL.get(name, {}), "between": list(between)}}
    facts = RunFacts(dim=D, num_samples=40, num_steps=10, steps_per_epoch=5, seed=0, world=World())
    objective = Objective(TypeAdapter(Terms).validate_python(recipe), facts=facts)
    leaves = {kind: rows.detach().clone().requires_grad_() for kind, rows in outputs.items()}
    parameters = {key: value.double() for key, value in objective.parameters().items()}
    for step in range(2):
        for leaf in leaves.values():
            leaf.grad = None
        value, _ = objective.evaluate({**leaves, **parameters}, replace(batch, step=step), teacher=teacher)
        if value.requires_grad:
            value.backward()
        objective.commit()
    return {"value": value.detach(), **{kind: leaf.grad for kind, leaf in leaves.items()}}


def drawn(count: int, seed: int) -> Tensor:
    return unit(torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def with_texts(ids: Tensor, tokens: Tensor, owners: Tensor | None = None) -> Batch:
    """Samples with labels and texts; `owners` are those that have audio."""
    batch = batch_of(ids, tokens=tokens, labels=ids % 3)
    if owners is None:
        return batch
    nothing = Texts(
        torch.zeros(len(owners), 1, dtype=torch.int64), torch.ones(len(owners), dtype=torch.int64), owners=owners
    )
    return replace(batch, parts={**batch.parts, "audio": nothing})


@pytest.mark.parametrize("name", pair_terms())
def test_every_term_between_kinds_is_that_of_the_samples_with_both(name: str) -> None:
    """With its teacher, labels, captions and memory: as if the samples without audio were not there."""
    owners = torch.arange(N)[HAS_AUDIO]
    tokens = (torch.arange(N) % 4)[:, None].expand(-1, 3).contiguous()
    image, audio = drawn(N, 1), drawn(len(owners), 2)
    taught = drawn(N, 3), drawn(len(owners), 4)
    shared = {"logit_scale": torch.tensor([SCALE]).double(), "logit_bias": torch.tensor([-5.0]).double()}
    found = value_and_gradients(
        name,
        ("image", "audio"),
        {"image": image, "audio": audio, **shared},
        {"image": taught[0], "audio": taught[1]},
        with_texts(IDS, tokens, owners),
    )
    expected = value_and_gradients(
        name,
        ("image", "text"),
        {"image": image[owners], "text": audio, **shared},
        {"image": taught[0][owners], "text": taught[1]},
        with_texts(IDS[owners], tokens[owners]),
    )
    assert expected["value"] != 0
    for mine, theirs in (("value", "value"), ("audio", "text"), ("logit_scale", "logit_scale")):
        torch.testing.assert_close(found[mine], expected[theirs], rtol=1e-12, atol=1e-12)
    whole = torch.zeros_like(image)
    if expected["image"] is not None:
        whole[owners] = expected["image"]
    torch.testing.assert_close(found["image"], whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", pair_terms())
def test_a_batch_without_any_row_of_a_kind_costs_nothing(name: str) -> None:
    none = torch.arange(0)
    outputs = {"image": drawn(3, 1), "audio": torch.zeros(0, D).double(), "logit_scale": torch.tensor([SCALE]).double()}
    outputs["logit_bias"] = torch.tensor([-5.0]).double()
    teacher = {"image": drawn(3, 2), "audio": torch.zeros(0, D).double()}
    batch = with_texts(torch.arange(3), torch.ones(3, 1, dtype=torch.int64), none)
    found = value_and_gradients(name, ("image", "audio"), outputs, teacher, batch)
    assert found.pop("value") == 0
    assert all(gradient is None or not gradient.any() for gradient in found.values())


def test_contrast_with_no_row_of_a_kind_costs_nothing() -> None:
    x = drawn(3, 1).requires_grad_()
    nothing = torch.zeros(0, D, dtype=torch.float64)
    scale = torch.tensor([SCALE]).double()
    value = functional.contrast(x, nothing, scale, x_ids=torch.arange(3), y_ids=torch.arange(0))
    value.backward()
    assert value == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_pairs_take_one_row_a_sample() -> None:
    step = local_step(*fixture(), Exchange(World()))
    with pytest.raises(UserError, match="objective: captions has several rows a sample"):
        step.all_rows.pairs(("image", "captions"))


def test_a_kind_that_nobody_makes_is_one_line() -> None:
    outputs, batch = outputs_of(torch.eye(3), torch.eye(3), torch.ones(1)), batch_of(3)
    terms = TypeAdapter(Terms).validate_python({"far": {"kind": "clip", "between": ["image", "txet"]}})
    with pytest.raises(UserError, match=r"objective\.far\.between: model and data make no 'txet'; nearest: text"):
        Objective(terms).evaluate(outputs, batch)
    providers = TypeAdapter(Providers).validate_python({"feature_transform": {"between": ["imagee", "text"]}})
    with pytest.raises(UserError, match=r"providers\.feature_transform\.between: .*'imagee'; nearest: image"):
        Objective(TypeAdapter(Terms).validate_python({"clip": 1.0}), providers).evaluate(outputs, batch)


def test_providers_serve_terms_between_their_own_kinds() -> None:
    terms = TypeAdapter(Terms).validate_python({"clip": 1, "sound": {"kind": "clip", "between": ["image", "audio"]}})

    def attached(provider: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        return Objective(terms, TypeAdapter(Providers).validate_python({"feature_transform": provider}))._attached

    assert attached({}) == {"clip": ("feature_transform",), "sound": ()}
    assert attached({"between": ["image", "audio"]}) == {"clip": (), "sound": ("feature_transform",)}
    with pytest.raises(UserError, match="attach_to: sound is not between image and text"):
        attached({"attach_to": ["sound"]})


@pytest.mark.parametrize("name", pair_terms())
def test_every_term_needs_the_kinds_that_it_is_between(name: str) -> None:
    term = TERMS.find(name).model_validate({"between": ["image", "audio"]})
    assert {"image", "audio"} <= term.needs().outputs
    assert "text" not in term.needs().outputs | term.needs().gathered


@pytest.mark.parametrize("name", sorted(PROVIDERS.all()))
def test_every_provider_needs_the_kinds_that_it_is_between(name: str) -> None:
    provider = PROVIDERS.find(name).model_validate({"between": ["image", "audio"]})
    assert "text" not in provider.needs().outputs | provider.needs().gathered | provider.needs().teacher_outputs
