"""The first step is rehearsed before anything is written: what it would refuse is refused, and nothing else."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tests.launch.tiny import MODEL
from tests.vlm.model.tiny import tiny_model
from vlm.errors import EveryRankError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.objectives.recipe import Providers, Terms
from vlm.objectives.registry import PROVIDERS, TERMS
from vlm.similarity.config import SimilarityConfig
from vlm.training.rehearsal import Brought, rehearse

BIASED = {"architecture": {**MODEL["architecture"], "embed_dim": 24}, "init_logit_bias": -10.0}

EDITORS = frozenset({"number", "colour"})


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return build_model(ModelConfig.model_validate(BIASED))


def rehearsed(model: DualEncoder, objective: Any, providers: Any = None, **changes: Any) -> None:
    terms = TypeAdapter(Terms).validate_python(objective)
    added = TypeAdapter(Providers).validate_python(providers or {})
    num_pairs, similarity = changes.pop("num_pairs", 64), SimilarityConfig(group_ranks=2)
    brought = Brought(**{"labels": True, "captions": True, **changes})
    rehearse(model, terms, added, similarity, num_pairs=num_pairs, brought=brought)


def all_of(registry: Any, kind: Any) -> list[str]:
    """The names that need no options."""
    names = []
    for name in registry._classes:
        try:
            TypeAdapter(kind).validate_python({name: {}})
        except ValidationError:
            continue
        names.append(name)
    return names


@pytest.mark.parametrize("num_pairs", [2, 10_000])
def test_every_term_and_provider_passes_where_model_and_data_have_what_it_needs(
    model: DualEncoder, num_pairs: int
) -> None:
    weights, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    terms = all_of(TERMS, Terms)
    assert len(terms) >= 15
    for name in terms:
        captioned = tiny_model(captioner={"preset": "tiny"}) if name in ("caption", "interleaved") else model
        rehearsed(captioned, {name: {}}, num_pairs=num_pairs, documents=True, degraded=True, editors=EDITORS)
    for name in all_of(PROVIDERS, Providers):
        rehearsed(model, {"clip": 1.0}, {name: {}}, num_pairs=num_pairs, editors=EDITORS)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("objective", "changes", "said"),
    [
        ({"supervised": 1.0}, {"labels": False}, "not every sample has one"),
        ({"multi_positive": {"captions": "all"}}, {"captions": False}, "set data.caption to `all`"),
        ({"multi_head": {"heads": 5}}, {}, "5 heads do not divide the embedding's 24 dimensions"),
        ({"caption": 2.0}, {}, r"objective\.caption: the model has no captioning decoder; set model\.captioner"),
    ],
)
def test_what_data_or_model_lack_is_refused(
    model: DualEncoder, objective: Any, changes: dict[str, bool], said: str
) -> None:
    with pytest.raises(EveryRankError, match=said):
        rehearsed(model, objective, **changes)


def test_a_model_that_cannot_make_embeddings_is_refused() -> None:
    model = build_model(ModelConfig.model_validate(MODEL))
    with pytest.raises(EveryRankError, match="the model has no logit bias"):
        rehearsed(model, {"sigmoid": 1.0})
    embedding = model.text.get_submodule("token_embedding")
    assert isinstance(embedding, torch.nn.Embedding)
    embedding.weight.data = embedding.weight[:100]
    with pytest.raises(EveryRankError, match="model: the text tower cannot read its texts: index out of range"):
        rehearsed(model, {"clip": 1.0})
    model.image.get_parameter("trunk.proj").data.fill_(float("nan"))
    with pytest.raises(EveryRankError, match="model: the image tower makes embeddings that are no finite numbers"):
        rehearsed(model, {"clip": 1.0})
