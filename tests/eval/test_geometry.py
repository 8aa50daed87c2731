"""Geometry of held-out pairs: definitions, closed forms for a moved gap and for arithmetic, any number of ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from data.loading.heldout import HeldOutSet
from eval.gap import moved_together
from eval.geometry import (
    Geometry,
    GeometryEvaluationConfig,
    arithmetic_accuracy,
    separability,
)
from eval.geometry_plots import write_plots
from eval.retrieval import Retrieval, RetrievalConfig
from tests.data.small_shards import picture, sample, write_shard
from tests.eval.encoders import CONTEXT, DIM, IMAGE, PointEncoder, SmallEncoder, captioned_shard, embed
from tests.ranks import run_ranks
from tests.vlm.objectives.geometry_definitions import log_mean_potential
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.geometry.clouds import centroid_gap

# Uneven numbers of captions; sample 4 has none; the picture of sample 6 is broken.
CAPTIONS = [[f"{n} {'abcdefgh'[(n * k) % 8] * 3} {k}" for k in range(0 if n == 4 else 1 + n % 4)] for n in range(19)]
BROKEN = (6,)


def evaluation(pattern: str, sample: int = 2048) -> Geometry:
    config = GeometryEvaluationConfig(kind="geometry", shards=pattern, batch_size=5, sample=sample)
    return Geometry(config, CONTEXT)


def on_this_rank(pattern: str) -> dict[str, float]:
    return evaluation(pattern).run(SmallEncoder(), World.current()).figures


def test_figures_are_those_of_pairs_of_an_image_and_its_first_caption(tmp_path: Path) -> None:
    pattern = captioned_shard(tmp_path, CAPTIONS, BROKEN)
    measured = evaluation(pattern).measure(SmallEncoder(), World())
    usable = [n for n in range(len(CAPTIONS)) if CAPTIONS[n] and n not in BROKEN]
    batches = list(HeldOutSet(pattern, IMAGE).batches(World(), 1))
    image, text = embed(SmallEncoder(), [batches[n].images[0] for n in usable], [CAPTIONS[n][0] for n in usable])
    torch.testing.assert_close(measured.images.double(), image, rtol=0, atol=1e-6)
    torch.testing.assert_close(measured.texts.double(), text, rtol=0, atol=1e-6)
    figures = measured.figures
    assert figures["uniformity_cross"] == pytest.approx(log_mean_potential(image, text).item(), abs=1e-5)
    assert figures["alignment"] == pytest.approx((2 - 2 * (image * text).sum(1)).mean().item(), abs=1e-5)
    assert (figures["num_images"], figures["num_skipped"]) == (17, 2)
    assert sum(measured.scores["positive"]) == sum(measured.scores["hardest_negative"]) == 17
    assert sum(measured.spectra["image"]) == pytest.approx(1)


def test_negatives_weights_at_the_models_scale_and_tolerance_where_there_are_labels(tmp_path: Path) -> None:
    """Each row and each pair of one class in turn; a scale above the limit counts as the limit."""
    labels = [0, 0, 1, 2, 1, 3, 0, 2, 2]
    samples = [
        sample(n, jpg=picture(n), json=json.dumps({"captions": [f"{n} {'abc'[n % 3] * 4}"]}), cls=label)
        for n, label in enumerate(labels)
    ]
    pattern = str(write_shard(tmp_path / "labelled.tar", samples))
    encoder = SmallEncoder()
    assert "hardness_entropy" not in evaluation(pattern).run(encoder, World()).figures
    for scale in (20.0, 1e4):
        encoder.logit_scale = torch.nn.Parameter(torch.tensor([math.log(scale)]))
        measured = evaluation(pattern).measure(encoder, World())
        image, text = measured.images.double(), measured.texts.double()
        entropies, hardest, cosines = [], [], []
        for i in range(9):
            weights = [math.exp(min(scale, 100) * float(image[i] @ text[j])) for j in range(9) if j != i]
            shares = [weight / sum(weights) for weight in weights]
            entropies.append(-sum(share * math.log(share) for share in shares))
            hardest.append(max(shares))
            cosines += [float(image[i] @ image[j]) for j in range(9) if j != i and labels[j] == labels[i]]
        assert measured.figures["hardness_entropy"] == pytest.approx(sum(entropies) / 9, rel=1e-4)
        assert measured.figures["hardest_negative_weight"] == pytest.approx(sum(hardest) / 9, rel=1e-4)
        assert measured.figures["tolerance_image"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
        assert measured.figures.keys() == {metric.name for metric in evaluation(pattern).metrics}


def test_retrieval_at_no_shift_is_that_of_all_captions(tmp_path: Path) -> None:
    pattern = captioned_shard(tmp_path, CAPTIONS, BROKEN)
    figures = evaluation(pattern).run(SmallEncoder(), World()).figures
    config = RetrievalConfig(kind="retrieval", shards=pattern, batch_size=5)
    retrieval = Retrieval(config, CONTEXT)
    expected = retrieval.run(SmallEncoder(), World()).figures
    assert expected.keys() == {metric.name for metric in retrieval.metrics}
    for way in ("image_to_text_r@1", "text_to_image_r@1"):
        assert figures[f"shift_0_{way}"] == expected[way]


def test_ranks_find_the_same_figures(tmp_path: Path) -> None:
    pattern = captioned_shard(tmp_path, CAPTIONS, BROKEN)
    alone = on_this_rank(pattern)
    for found in run_ranks(on_this_rank, 3, pattern):
        assert found == alone


def test_a_sample_is_evenly_spaced(tmp_path: Path) -> None:
    pattern = captioned_shard(tmp_path, CAPTIONS, BROKEN)
    whole = evaluation(pattern).measure(SmallEncoder(), World())
    some = evaluation(pattern, sample=5).measure(SmallEncoder(), World())
    assert torch.equal(some.images, whole.images[[0, 3, 6, 10, 13]])


def test_a_shift_of_one_makes_the_centroids_meet() -> None:
    generator = torch.Generator().manual_seed(1)
    image = normalize(torch.randn(400, 16, generator=generator) + torch.eye(16)[0], dim=1)
    text = normalize(torch.randn(400, 16, generator=generator) - torch.eye(16)[0], dim=1)
    before, _ = centroid_gap(image, text)
    after, _ = centroid_gap(*moved_together(image, text, 1.0))
    apart, _ = centroid_gap(*moved_together(image, text, -1.0))
    assert after < 0.1 * before
    assert apart > 1.2 * before
    assert moved_together(image, text, 0.0) == (image, text)


def test_separability_of_two_points_and_of_one_cloud() -> None:
    points = torch.eye(4)[:2]
    assert separability(points[:1].repeat(20, 1), points[1:].repeat(20, 1)) == 1.0
    rows = normalize(torch.randn(500, 8, generator=torch.Generator().manual_seed(2)), dim=1)
    assert 0.4 < separability(rows[:250], rows[250:]) < 0.6


def test_arithmetic_finds_the_next_image_where_texts_differ_as_images_do() -> None:
    generator = torch.Generator().manual_seed(3)
    images = normalize(torch.randn(30, 12, generator=generator), dim=1)
    offset = torch.full((12,), 0.4)
    assert arithmetic_accuracy(images, images + offset) == 1.0
    unrelated = normalize(torch.randn(30, 12, generator=generator), dim=1)
    assert arithmetic_accuracy(images, unrelated) < 0.5
    assert arithmetic_accuracy(images[:1].repeat(6, 1), images[:6]) == 0  # ties count against the model


def test_plots_are_drawn(tmp_path: Path) -> None:
    measured = evaluation(captioned_shard(tmp_path, CAPTIONS, BROKEN)).measure(SmallEncoder(), World())
    paths = write_plots(measured, tmp_path / "plots")
    assert [path.name for path in paths] == ["clouds.png", "scores.png", "spectra.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(path.name for path in paths)


def test_shards_without_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sample of .* has a caption"):
        evaluation(captioned_shard(tmp_path, [[], []]))


def test_too_few_pairs_and_embeddings_without_numbers_are_refused_in_a_line(tmp_path: Path) -> None:
    few = evaluation(captioned_shard(tmp_path, CAPTIONS[:4]))
    with pytest.raises(UserError, match="needs 5 usable pairs; there are 4"):
        few.run(SmallEncoder(), World())
    enough = evaluation(captioned_shard(tmp_path, CAPTIONS))
    with pytest.raises(UserError, match="embeddings are not finite"):
        enough.run(PointEncoder(float("nan")), World())
    assert enough.run(PointEncoder(DIM**-0.5), World()).figures["effective_rank_image"] == 0


def test_arithmetic_leaves_out_the_image_that_it_starts_from() -> None:
    """All texts are one, so that a query is its own image; each next angle is nearer than the last one, but for 0."""
    angles = torch.tensor([0.0, 30.0, 50.0, 62.0, 70.0]).deg2rad()
    images = torch.stack([angles.cos(), angles.sin()], 1)
    assert arithmetic_accuracy(images, images[:1].expand(5, 2)) == 0.8
