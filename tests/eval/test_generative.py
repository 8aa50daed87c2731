"""Generative zero-shot classification against a double loop over images and prompts, and itself on other ranks."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from data.loading.heldout import HeldOutSet
from eval.evaluator import EvaluationContext
from eval.generative import GenerativeZeroShot, GenerativeZeroShotConfig
from tests.data.small_shards import WordTokenizer, picture, sample, write_shard
from tests.eval.ranked import figures_of
from tests.launch.test_captioner import MODEL
from tests.ranks import run_ranks
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.model.captioner import CaptionDecoder
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder

CLASSES = ("red", "blue and green", "a pale grey one", "grey", "red", "black", "white")  # two are equal
TEMPLATES = ("a {}", "{} beside {c}")
LABELS = [n * n % 6 for n in range(8)]
LETTERS = 128
NORMALISATIONS = ("total", "token", "prior")
SEED = 6
TOWERS: dict[str, Any] = MODEL["towers"]
TEXT = {"text_cfg": {**TOWERS["text"]["text_cfg"], "context_length": 40}}
WIDE = {**MODEL, "towers": {**TOWERS, "text": TEXT}}
letters = WordTokenizer()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Labelled pictures, and one that cannot be read."""
    samples = [sample(n, jpg=picture(n), cls=label) for n, label in enumerate(LABELS)]
    folder = tmp_path_factory.mktemp("labelled")
    return str(write_shard(folder / "labelled.tar", [*samples, sample(99, jpg=picture(99)[:90], cls=0)]))


def drawn_model() -> DualEncoder:
    """A model whose tokens are letters, and whose decoder is sure of itself and of what it sees."""
    model = build_model(ModelConfig.model_validate(WIDE), seed=SEED).eval()
    assert isinstance(model.decoder, CaptionDecoder)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        weight = model.decoder.vocabulary.weight[:, :LETTERS]
    model.decoder.vocabulary.weight = nn.Parameter(weight.clone())
    return model


def evaluator(shard: str, model: DualEncoder, batch_size: int, **changes: Any) -> GenerativeZeroShot:
    values = {"classes": CLASSES, "templates": TEMPLATES, "batch_size": batch_size, **changes}
    config = GenerativeZeroShotConfig.model_validate({"kind": "generative_zeroshot", "shards": shard, **values})
    return GenerativeZeroShot(config, EvaluationContext(model.image_spec, letters))


@pytest.fixture(scope="module")
def likelihoods(shard: str) -> list[list[list[float]]]:
    """log p of each prompt of each class under each image, one pair at a time in float64; last, under the mean."""
    model = drawn_model().double()
    spec = model.image_spec
    images = [batch.images for batch in HeldOutSet(shard, spec).batches(World(), 1) if batch.valid.all()]
    mean = torch.tensor([round(255 * value) for value in spec.mean], dtype=torch.uint8)
    images.append(mean[None, :, None, None].expand(1, 3, spec.size, spec.size))
    found = []
    with torch.no_grad():
        for image in images:
            shown = model.encode_image_and_tokens(image)[1]
            found.append(
                [
                    [
                        float(model.caption_likelihood(shown, *letters([template.format(name, c=name)])))
                        for template in TEMPLATES
                    ]
                    for name in CLASSES
                ]
            )
    return found


def expected(likelihoods: list[list[list[float]]], normalise: str, templates: Sequence[int]) -> dict[str, float]:
    def score(of_image: list[list[float]], label: int) -> float:
        total = 0.0
        for place in templates:
            tokens = len(TEMPLATES[place].format(CLASSES[label], c=CLASSES[label])) - 1
            total += math.exp(of_image[label][place] / (tokens if normalise == "token" else 1))
        return math.log(total / len(templates))

    *images, mean = likelihoods
    ranks = []
    for label, of_image in zip(LABELS, images, strict=True):
        prior = [score(mean, other) if normalise == "prior" else 0.0 for other in range(len(CLASSES))]
        scores = [score(of_image, other) - prior[other] for other in range(len(CLASSES))]
        others = [other for other in range(len(CLASSES)) if CLASSES[other] != CLASSES[label]]
        ranks.append(
            1 + (CLASSES.index(CLASSES[label]) != label) + sum(scores[other] >= scores[label] for other in others)
        )
    return figures_of(ranks, LABELS, num_skipped=1)


def figures(shard: str, batch_size: int, normalise: str, templates: Sequence[int] = (0, 1)) -> dict[str, float]:
    model = drawn_model()
    chosen = tuple(TEMPLATES[place] for place in templates)
    one = evaluator(shard, model, batch_size, normalise=normalise, templates=chosen)
    one.require(model)
    found = one.run(model, World.current()).figures
    assert found.keys() == {metric.name for metric in one.metrics}
    return found


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_the_figures_are_those_of_a_double_loop(
    shard: str, likelihoods: list[list[list[float]]], normalise: str
) -> None:
    for batch_size, templates in ((5, (0, 1)), (16, (1,))):
        wanted = expected(likelihoods, normalise, templates)
        assert figures(shard, batch_size, normalise, templates) == pytest.approx(wanted, rel=1e-12)


def test_neither_do_tiles_change_them(
    shard: str, likelihoods: list[list[list[float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.generative._TILE_TOKENS", 300)
    monkeypatch.setattr("eval.generative._TILE_IMAGES", (2, 3))
    assert figures(shard, 7, "token") == pytest.approx(expected(likelihoods, "token", (0, 1)), rel=1e-12)


def test_the_ways_differ(likelihoods: list[list[list[float]]]) -> None:
    found = [expected(likelihoods, normalise, (0, 1)) for normalise in NORMALISATIONS]
    assert len({(one["top1"], one["top5"]) for one in found}) == 3
    assert all(0 < one["top1"] < one["top5"] < 1 for one in found)


def some_figures(shard: str, batch_size: int) -> list[dict[str, float]]:
    return [figures(shard, batch_size, normalise) for normalise in ("token", "prior")]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 3), (3, 16)])
def test_every_rank_of_any_number_gets_the_same_figures(shard: str, world_size: int, batch_size: int) -> None:
    assert run_ranks(some_figures, world_size, shard, batch_size) == [some_figures(shard, 8)] * world_size


def test_what_no_model_tells_apart_is_said(shard: str) -> None:
    (line,) = evaluator(shard, drawn_model(), 4).notices
    assert "classes 0 and 4 ('red') have equal prompts" in line


def test_a_decoder_of_no_numbers_is_always_wrong(shard: str) -> None:
    model = drawn_model()
    assert isinstance(model.decoder, CaptionDecoder)
    with torch.no_grad():
        model.decoder.ln_final.bias.fill_(torch.nan)
    found = evaluator(shard, model, 8).run(model, World()).figures
    assert (found["top1"], found["top5"], found["num_samples"]) == (0, 0, len(LABELS))
