"""Zero-shot classification against open_clip's own code, a single loop over images, and itself on other ranks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor, nn

from data.loading.heldout import HeldOutSet
from eval.evaluator import EvaluationContext
from eval.zeroshot import ZeroShot, ZeroShotConfig
from tests.data.small_shards import WordTokenizer, picture, sample, write_shard
from tests.eval.encoders import CONTEXT, IMAGE, PointEncoder, SmallEncoder, embed, labelled_shard
from tests.eval.ranked import figures_of
from tests.ranks import run_ranks
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import TokenBatch

CLASSES = ("red", "blue", "pale green", "grey", "brown", "black", "white")
TEMPLATES = ("a {} thing", "{}", "something {c}!")
LABELS = [n * n % 6 for n in range(23)]  # class 6 never occurs, 2 and 5 neither


def evaluation(pattern: str, batch_size: int = 5, classes: Sequence[str] = CLASSES) -> ZeroShot:
    config = ZeroShotConfig(
        kind="zeroshot", shards=pattern, classes=tuple(classes), templates=TEMPLATES, batch_size=batch_size
    )
    return ZeroShot(config, CONTEXT)


def brute_force(pattern: str, classes: Sequence[str] = CLASSES) -> dict[str, float]:
    batches = list(HeldOutSet(pattern, IMAGE).batches(World(), 1))
    prompts = [template.format(name, c=name) for name in classes for template in TEMPLATES]
    images, texts = embed(SmallEncoder(), [batch.images[0] for batch in batches], prompts)
    means = [texts[3 * k : 3 * k + 3].mean(0) for k in range(len(classes))]
    ranks = []
    for label, image in zip(LABELS, images, strict=True):
        scores = [float(image @ mean / mean.norm()) for mean in means]
        ranks.append(sum(score >= scores[label] for score in scores))
    return figures_of(ranks, LABELS)


def on_this_rank(pattern: str, batch_size: int) -> dict[str, float]:
    return evaluation(pattern, batch_size).run(SmallEncoder(), World.current()).figures


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_one_process_equals_the_definition(tmp_path: Path, batch_size: int) -> None:
    pattern = labelled_shard(tmp_path, LABELS)
    expected = brute_force(pattern)
    assert 0 < expected["top1"] < expected["top5"] < 1
    assert expected["mean_per_class_recall"] != pytest.approx(expected["top1"])
    assert on_this_rank(pattern, batch_size) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 3), (3, 64)])
def test_every_rank_of_any_number_gets_the_same_figures(tmp_path: Path, world_size: int, batch_size: int) -> None:
    pattern = labelled_shard(tmp_path, LABELS)
    one = on_this_rank(pattern, 7)
    assert run_ranks(on_this_rank, world_size, pattern, batch_size) == [one] * world_size


SHIFTS = (-4.0, 0.0, 3.0)


def shifted_on_this_rank(pattern: str, batch_size: int) -> dict[str, float]:
    config = ZeroShotConfig(
        kind="zeroshot", shards=pattern, classes=CLASSES, templates=TEMPLATES, batch_size=batch_size, shifts=SHIFTS
    )
    evaluator = ZeroShot(config, CONTEXT)
    figures = evaluator.run(SmallEncoder(), World.current()).figures
    assert figures.keys() == {metric.name for metric in evaluator.metrics}
    return figures


def test_shifts_move_images_and_classes_along_the_difference_of_their_centroids(tmp_path: Path) -> None:
    """Each image and class in turn, in float64; what does not move is what is measured without shifts."""
    pattern = labelled_shard(tmp_path, LABELS)
    batches = list(HeldOutSet(pattern, IMAGE).batches(World(), 1))
    prompts = [template.format(name, c=name) for name in CLASSES for template in TEMPLATES]
    images, texts = embed(SmallEncoder(), [batch.images[0] for batch in batches], prompts)
    means = [texts[3 * k : 3 * k + 3].mean(0) for k in range(len(CLASSES))]
    classes = [mean / mean.norm() for mean in means]
    gap = sum(images) / len(images) - sum(classes) / len(classes)
    expected = on_this_rank(pattern, 5)
    for shift in SHIFTS:
        hits = 0
        for label, image in zip(LABELS, images, strict=True):
            scores = []
            for row in classes:
                moved_image, moved_class = image - shift / 2 * gap, row + shift / 2 * gap
                scores.append(float(moved_image @ moved_class / moved_class.norm()))
            hits += scores.index(max(scores)) == label
        expected[f"shift_{shift:g}_top1"] = hits / len(LABELS)
    assert len({expected[f"shift_{shift:g}_top1"] for shift in SHIFTS}) > 1
    found = shifted_on_this_rank(pattern, 5)
    assert found == pytest.approx(expected, rel=1e-12)
    assert run_ranks(shifted_on_this_rank, 3, pattern, 4) == [found] * 3


class TinyClip(nn.Module):
    """A small model of open_clip behind our interface, which takes uint8 images and normalises them."""

    spec = ImageSpec(size=32)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
        text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
        self.clip = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)

    def normalised(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float32[Tensor, "batch 3 height width"]:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.spec.mean, self.spec.std))
        return (images / 255 - mean) / std

    def encode_image(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float32[Tensor, "batch dim"]:
        embeddings: Tensor = self.clip.encode_image(self.normalised(images), normalize=True)
        return embeddings

    def encode_text(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float32[Tensor, "batch dim"]:
        embeddings: Tensor = self.clip.encode_text(tokens, normalize=True)
        return embeddings


def full_length(texts: Sequence[str]) -> TokenBatch:
    tokens = open_clip.get_tokenizer("ViT-B-32")(list(texts))
    return TokenBatch(tokens, (tokens != 0).sum(1))


def test_the_figures_are_those_of_open_clip(tmp_path: Path) -> None:
    labels = [n % 10 for n in range(60)]
    samples = [sample(n, jpg=picture(n, (48, 40)), cls=label) for n, label in enumerate(labels)]
    pattern = str(write_shard(tmp_path / "test.tar", samples))
    classes = tuple(open_clip.IMAGENET_CLASSNAMES[:10])
    model = TinyClip()
    config = ZeroShotConfig(kind="zeroshot", shards=pattern, classes=classes, templates="simple", batch_size=16)
    found = ZeroShot(config, EvaluationContext(model.spec, full_length))

    classifier = open_clip.build_zero_shot_classifier(
        model.clip, open_clip.get_tokenizer("ViT-B-32"), classes, open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    torch.testing.assert_close(found.class_embeddings(model, World()), classifier.T, rtol=0, atol=2e-6)
    (batch,) = HeldOutSet(pattern, model.spec).batches(World(), 100)
    with torch.no_grad():
        logits = 100 * model.encode_image(batch.images) @ classifier
    # The body of open_clip_train.zero_shot.accuracy, which itself fails with numpy 2.5.
    correct = logits.topk(5, 1, True, True)[1].t().eq(torch.tensor(labels).view(1, -1))
    top1, top5 = (int(correct[:k].sum()) for k in (1, 5))
    figures = found.run(model, World()).figures
    assert 0 < top1 < top5 < 60
    assert (figures["top1"], figures["top5"]) == (top1 / 60, top5 / 60)


EQUAL = ("missile", "red", "Missile ", "blue", "projectile", "missile", "white")  # to CLIP's tokenizer: 0, 2 and 5


@pytest.mark.parametrize("shifts", [(), (0.0,)])
def test_of_classes_with_equal_prompts_the_first_is_the_answer(tmp_path: Path, shifts: tuple[float, ...]) -> None:
    """As where the first of the highest scores is taken, which is what the public harnesses do."""
    labels = [n % len(EQUAL) for n in range(70)]
    samples = [sample(n, jpg=picture(n, (48, 40)), cls=label) for n, label in enumerate(labels)]
    pattern = str(write_shard(tmp_path / "test.tar", samples))
    model = TinyClip()
    config = ZeroShotConfig(
        kind="zeroshot", shards=pattern, classes=EQUAL, templates="simple", batch_size=16, shifts=shifts
    )
    found = ZeroShot(config, EvaluationContext(model.spec, full_length))
    (batch,) = HeldOutSet(pattern, model.spec).batches(World(), 100)
    with torch.no_grad():
        rows, classes = model.encode_image(batch.images).double(), found.class_embeddings(model, World()).double()
        # Pair by pair: a matrix product may round equal columns differently.
        scores = (rows[:, None] * classes).sum(2).float().tolist()
    orders = [sorted(range(len(EQUAL)), key=lambda k: -row[k]) for row in scores]
    figures = found.run(model, World()).figures
    for most, name in ((1, "top1"), (5, "top5")):
        assert figures[name] == sum(y in order[:most] for y, order in zip(labels, orders, strict=True)) / 70
    answered = {order[0] for order in orders}
    assert 0 in answered
    assert not answered & {2, 5}
    if shifts:
        assert figures["shift_0_top1"] == figures["top1"]
    assert found.notices == (
        "shards: classes 0 and 2 ('Missile ') have equal prompts: the first is the answer to both, and 1 more such",
    )


def test_classes_that_differ_in_one_template_only_are_not_equal(tmp_path: Path) -> None:
    pattern = labelled_shard(tmp_path, [0, 1, 2])
    for templates, expected in ((("{}",), 1), (("{}", "x {}", "{c!r}"), 0)):
        config = ZeroShotConfig(kind="zeroshot", shards=pattern, classes=("a  b", "a b", "c"), templates=templates)
        assert len(ZeroShot(config, replace(CONTEXT, tokenizer=Spaceless())).notices) == expected


class Spaceless(WordTokenizer):
    """Takes spaces together, but for text in quotes."""

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        return super().__call__([text if "'" in text else " ".join(text.split()) for text in texts])


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_collapsed_model_recognises_nothing(tmp_path: Path, value: float) -> None:
    figures = evaluation(labelled_shard(tmp_path, LABELS)).run(PointEncoder(value), World()).figures
    assert [figures[name] for name in ("top1", "top5", "mean_per_class_recall")] == [0, 0, 0]


def test_fewer_than_five_classes(tmp_path: Path) -> None:
    figures = (
        evaluation(labelled_shard(tmp_path, [0, 1, 2, 2]), classes=CLASSES[:3]).run(SmallEncoder(), World()).figures
    )
    assert figures["top5"] == 1
    assert figures["top1"] < 1


def test_samples_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    samples = [sample(n, jpg=picture(n), cls=n % 3) for n in range(6)]
    samples[2] = sample(2, jpg=b"broken", cls=0)
    samples[3] = sample(3, jpg=picture(3))
    figures = evaluation(str(write_shard(tmp_path / "a.tar", samples))).run(SmallEncoder(), World()).figures
    assert (figures["num_samples"], figures["num_skipped"]) == (4, 2)


def test_labels_without_a_class_and_shards_without_labels_are_refused(tmp_path: Path) -> None:
    pattern = labelled_shard(tmp_path, [0, 1, 7, 3])
    words = r"^shards: sample 000002 has label 7, but there are 7 classes \(labels 0 to 6\)$"
    with pytest.raises(UserError, match=words):
        evaluation(pattern)
    with pytest.raises(UserError, match=r"^shards: no sample of .* has a label"):
        evaluation(labelled_shard(tmp_path, [None, None]))
    broken = write_shard(tmp_path / "broken.tar", [sample(0, jpg=b"broken", cls=0)])
    with pytest.raises(UserError, match=r"^shards: none of the 1 samples can be read"):
        evaluation(str(broken)).run(SmallEncoder(), World())
