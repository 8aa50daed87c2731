"""Rows of any kind: two kinds that are compared by contrast or by a term of pairs, on any number of uneven ranks."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.objectives.batches import batch_of, outputs_of
from tests.vlm.objectives.parity import UNEVEN, D, N, unit
from vlm.batch import Batch, BatchPart, Texts
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.objectives.contrast import contrast
from vlm.objectives.objective import Objective
from vlm.objectives.recipe import Providers, Terms
from vlm.objectives.registry import PROVIDERS, TERMS
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


@pytest.mark.parametrize("name", sorted(TERMS.all()))
def test_every_term_needs_the_kinds_that_it_is_between(name: str) -> None:
    term = TERMS.find(name).model_validate({"between": ["image", "audio"]})
    assert {"image", "audio"} <= term.needs().outputs
    assert "text" not in term.needs().outputs | term.needs().gathered


@pytest.mark.parametrize("name", sorted(PROVIDERS.all()))
def test_every_provider_needs_the_kinds_that_it_is_between(name: str) -> None:
    provider = PROVIDERS.find(name).model_validate({"between": ["image", "audio"]})
    assert "text" not in provider.needs().outputs | provider.needs().gathered | provider.needs().teacher_outputs
