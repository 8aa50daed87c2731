"""Counting against a loop over images and captions in float64, on other ranks, and on files as people have them."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from data.images.views import evaluation_view
from data.loading.heldout import HeldOutSet
from eval.choices.examples import QuestionExamples
from eval.choices.question import Question
from eval.counting import Counting, CountingConfig
from tests.data.small_shards import WordTokenizer, picture, sample, with_json, write_shard
from tests.eval.encoders import CONTEXT, IMAGE, PointEncoder, SmallEncoder, embed
from tests.ranks import run_ranks
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.evaluation import Evaluation
from vlm.model.tokenizer import TokenBatch

REAL = Path(os.environ.get("VLM_TEST_DATA", "missing"))
WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = [2, 3, 3, 10, 7, 2, 4, 9, 5, 6, 8, 3, 2]


def caption_of(place: int, number: int) -> str:
    return f"There are {WORDS[number - 2].upper()} or {place} cats"


def counted_shard(folder: Path) -> str:
    """Thirteen pictures whose caption has a number, and one that is no picture."""
    samples = [
        with_json(place, captions=["many things", caption_of(place, number)]) for place, number in enumerate(NUMBERS)
    ]
    broken = sample(99, jpg=b"not a picture", json=json.dumps({"captions": ["two dogs"]}))
    return str(write_shard(folder / "counted.tar", [*samples[:5], broken, *samples[5:]]))


def counting(batch_size: int = 4, **keys: Any) -> Counting:
    config = CountingConfig.model_validate({"kind": "counting", "batch_size": batch_size, **keys})
    config.check_files(None, str)
    return Counting(config, CONTEXT)


def asked(evaluator: Counting) -> list[tuple[int, str, int]]:
    """The image, the true caption and the number of each question."""
    questions: Sequence[Question] = evaluator._questions.asked
    return [(question.image, question.texts[0], int(question.kind)) for question in questions]


def brute_force(pattern: str, numbers: Sequence[int]) -> tuple[dict[str, float], dict[str, list[int]]]:
    """The figures and the confusion, each image with each caption in turn."""
    views = [batch.images[0] for batch in HeldOutSet(pattern, IMAGE).batches(World(), 1) if batch.valid.all()]
    confusion = {truth: dict.fromkeys(numbers, 0) for truth in numbers}
    deviation = 0
    for place, (view, truth) in enumerate(zip(views, NUMBERS, strict=True)):
        if truth not in numbers:
            continue
        images, texts = embed(SmallEncoder(), [view], [caption_of(place, number) for number in numbers])
        scores = [float(sum(a * b for a, b in zip(images[0], text, strict=True))) for text in texts]
        answer = numbers[scores.index(max(scores))]
        confusion[truth][answer] += 1
        deviation += abs(answer - truth)
    totals = {truth: sum(row.values()) for truth, row in confusion.items()}
    right = {truth: row[truth] for truth, row in confusion.items()}
    asked_for = [truth for truth in numbers if totals[truth]]
    figures = {
        "accuracy": sum(right.values()) / sum(totals.values()),
        "macro_accuracy": sum(right[truth] / totals[truth] for truth in asked_for) / len(asked_for),
        "mean_absolute_deviation": deviation / sum(totals.values()),
        "chance": 1 / len(numbers),
        **{f"accuracy_{truth}": right[truth] / totals[truth] for truth in asked_for},
        **{f"num_{truth}": totals[truth] for truth in numbers},
        "num_samples": sum(totals.values()),
        "num_skipped": 1,
        "num_missing": 0,
    }
    return figures, {WORDS[truth - 2]: list(row.values()) for truth, row in confusion.items()}


def check(found: Evaluation, pattern: str, numbers: Sequence[int]) -> None:
    figures, confusion = brute_force(pattern, numbers)
    known = {name: value for name, value in found.figures.items() if not name.startswith("interval")}
    assert known == pytest.approx(figures, rel=1e-12)
    assert found.tables["confusion"].rows == confusion
    assert list(found.tables["confusion"].columns) == list(confusion)
    assert found.figures["interval_low"] < found.figures["accuracy"] < found.figures["interval_high"]


@pytest.mark.parametrize(("batch_size", "numbers"), [(1, range(2, 11)), (64, range(2, 11)), (5, (2, 3, 10))])
def test_the_figures_are_those_of_a_loop(tmp_path: Path, batch_size: int, numbers: Sequence[int]) -> None:
    pattern = counted_shard(tmp_path)
    evaluator = counting(batch_size, shards=pattern, numbers=list(numbers))
    found = evaluator.run(SmallEncoder(), World())
    check(found, pattern, list(numbers))
    assert 0 < found.figures["accuracy"] < 1
    assert found.figures.keys() <= {metric.name for metric in evaluator.metrics}
    assert [skip.key for skip in evaluator.skipped] == ["000099"]


def test_examples_are_the_furthest_ahead_and_the_furthest_behind(tmp_path: Path) -> None:
    found = counting(shards=counted_shard(tmp_path)).run(SmallEncoder(), World())
    assert isinstance(found.examples, QuestionExamples)
    margins = {}
    for place, number in enumerate(NUMBERS):
        view = torch.from_numpy(evaluation_view(picture(place), IMAGE).copy()).permute(2, 0, 1)
        images, texts = embed(SmallEncoder(), [view], [caption_of(place, other) for other in range(2, 11)])
        scores = (texts @ images[0]).tolist()
        own = scores.pop(number - 2)
        rank = 1 + sum(score >= own for score in scores)
        margins[place] = (own - max(scores), rank, caption_of(place, number))
    order = sorted(margins.values(), reverse=True)
    chosen = found.examples.choose(3)
    assert [(one.rank, one.captions[0]) for one in chosen.best] == [one[1:] for one in order[:3]]
    assert [(one.rank, one.captions[0]) for one in chosen.worst] == [one[1:] for one in order[:-4:-1]]
    first = chosen.best[0].retrieved
    assert [one.score for one in first] == sorted((one.score for one in first), reverse=True)
    assert (first[0].text, first[0].correct, len(first)) == (order[0][2], True, 5)


def on_this_rank(patterns: Sequence[str], batch_size: int) -> tuple[list[Any], dict[str, int]]:
    """What is found in each, and how many forwards it all took."""
    encoder = SmallEncoder()
    found = [counting(batch_size, shards=pattern).run(encoder, World.current()) for pattern in patterns]
    return [(one.figures, one.tables["confusion"].rows) for one in found], encoder.num_forwards


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 3), (3, 7)])
def test_every_rank_of_any_number_gets_the_same_figures(tmp_path: Path, world_size: int, batch_size: int) -> None:
    """In as many forwards on each; also of two images, which leave a third rank without any."""
    few = write_shard(tmp_path / "few.tar", [with_json(n, captions=[f"{WORDS[n]} cats"]) for n in range(2)])
    patterns = [counted_shard(tmp_path), str(few)]
    ranks = run_ranks(on_this_rank, world_size, patterns, batch_size)
    assert [found for found, _ in ranks] == [on_this_rank(patterns, 4)[0]] * world_size
    assert all(forwards == ranks[0][1] for _, forwards in ranks)


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_ties_are_misses_and_as_far_off_as_they_can_be(tmp_path: Path, value: float) -> None:
    found = counting(shards=counted_shard(tmp_path)).run(PointEncoder(value), World()).figures
    assert found["accuracy"] == 0
    assert found["mean_absolute_deviation"] == sum(max(number - 2, 10 - number) for number in NUMBERS) / len(NUMBERS)


class Short(WordTokenizer):
    """Sees the first letters alone."""

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        return super().__call__([text[:11] for text in texts])


class Trembling(SmallEncoder):
    """Makes slightly other embeddings of equal texts in other rows of a batch, as kernels may."""

    def encode_text(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float32[Tensor, "batch dim"]:
        return super().encode_text(tokens, lengths) * (1 - 1e-6 * torch.arange(len(tokens))[:, None])


def test_captions_that_the_tokenizer_makes_equal_are_misses_and_told(tmp_path: Path) -> None:
    """`There are T` is all of two, of three and of ten."""
    config = CountingConfig.model_validate({"kind": "counting", "shards": counted_shard(tmp_path)})
    evaluator = Counting(config, type(CONTEXT)(IMAGE, Short()))
    found = evaluator.run(Trembling(), World()).figures
    letters = [word[0] for word in WORDS]
    shared = [number for number in NUMBERS if letters.count(letters[number - 2]) > 1]
    assert any(f"in {len(shared)} of 14 questions the tokenizer" in line for line in evaluator.notices)
    assert all(found[f"accuracy_{number}"] == 0 for number in set(shared))


def with_number(place: int, number: int, **fields: Any) -> dict[str, Any]:
    return sample(place, jpg=picture(place), json=json.dumps({"number": number, **fields}))


def test_what_shards_ask(tmp_path: Path) -> None:
    """By a number, by the only spelled number, by one that is among the counts; the rest is told with its reason."""
    samples = [
        with_json(0, captions=["no number", "Four cats", "three cats"]),
        with_json(1, captions=["two cats and three dogs", "twenty-two cats", "7 cats"]),
        with_number(2, 3, captions=["two cats and three dogs", "a THREE"]),
        with_number(3, 4, captions=["two cats"]),
        with_number(4, 12, captions=["two cats"]),
        with_json(5, captions=["six hats", "five red circles"], counts={"red circle": 5, "blue square": 1}),
        with_json(6, captions=["six hats"], counts={"red circle": 5, "none": None}),
        with_json(7, captions=[]),
    ]
    evaluator = counting(shards=str(write_shard(tmp_path / "a.tar", samples)))
    assert asked(evaluator) == [(0, "Four cats", 4), (2, "two cats and three dogs", 3), (5, "five red circles", 5)]
    (line,) = evaluator.notices
    for words in (
        "shards: 5 of 8 samples ask nothing: 2 with no caption of exactly one spelled number",
        "1 with no caption that has their number's word",
        "1 with a number in their json that is not one of 2 to 10",
        "1 with a spelled number that is none of their counts",
    ):
        assert words in line
    third = evaluator._questions.asked[1]
    assert third.texts[:3] == ("two cats and three dogs", "two cats and two dogs", "two cats and four dogs")
    with pytest.raises(UserError, match=r"^shards: 1 of 1 samples ask nothing: 1 with no caption of exactly one"):
        counting(shards=str(write_shard(tmp_path / "b.tar", [sample(0)])))


URL = "http://example.org/{}.jpg?size=3"


def hashed(name: str) -> str:
    return hashlib.sha256(URL.format(name).encode()).hexdigest()[:16]


def benchmark(folder: Path, entries: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
    """CountBench's format with a folder of some of its images; the keys that name both."""
    entries = entries or [
        {"image_url": URL.format("a/first"), "text": "Three mice, three!", "number": 3},
        {"image_url": URL.format("a/th"), "text": "two networks of two", "number": 2},
        {"image_url": URL.format("b/th"), "text": "four of them", "number": 4},
        {"image_url": URL.format("a/fourth"), "text": "no such word", "number": 5},
        {"image_url": None, "image": "below/own", "text": "ten", "number": 10},
        {"image_url": URL.format("broken"), "text": "seven", "number": 7},
        {"image_url": URL.format("gone"), "text": "eight", "number": 8},
    ]
    (folder / "bench.json").write_text(json.dumps(entries))
    images = folder / "images"
    (images / "below").mkdir(parents=True)
    for number, name in enumerate(["first.jpg", f"{hashed('a/th')}.png", "th.jpg", "0003.webp", "below/own.jpeg"]):
        (images / name).write_bytes(picture(number))
    (images / "broken.jpg").write_bytes(picture(9)[:200])
    return {"file": str(folder / "bench.json"), "images": str(images)}


def test_a_file_and_its_images_as_people_have_them(tmp_path: Path) -> None:
    """By name, place, hash or address, whose last part may not be another's too; what is missing is told, not fatal."""
    evaluator = counting(**benchmark(tmp_path))
    assert asked(evaluator) == [
        (0, "Three mice, three!", 3),
        (1, "two networks of two", 2),
        (3, "ten", 10),
        (4, "seven", 7),
    ]
    assert evaluator._questions.asked[0].texts[1] == "Two mice, two!"
    assert evaluator._questions.asked[1].texts[1] == "three networks of three"
    found = evaluator.run(SmallEncoder(), World()).figures
    counts = {"num_samples": 3, "num_skipped": 2, "num_missing": 2, "num_10": 1, "num_7": 0}
    assert {name: found[name] for name in counts} == counts
    images = tmp_path / "images"
    assert evaluator.skipped[0].reason == "no caption has the word of its number (five)"
    assert [skip.key for skip in evaluator.skipped] == ["entry 3", "broken.jpg"]
    names = f"'0002' or '{hashed('b/th')}'"
    assert evaluator.notices == (f"file: 2 of 7 entries have no image in {images} (first: {names})",)
    for path in images.rglob("*.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"^file: 7 of 7 entries have no image in .*: nothing is left to ask$"):
        counting(file=str(tmp_path / "bench.json"), images=str(images))


def test_numbers_by_key_for_shards(tmp_path: Path) -> None:
    """As flickr8k-counts has them: entries of other shards are told, captions are the entry's or else the sample's."""
    shard = write_shard(
        tmp_path / "a.tar", [with_json(n, captions=["six cats"], source_name=f"{n}.jpg") for n in range(3)]
    )
    entries = [
        {"key": "000002", "number": 4, "captions": ["a dog", "Four dogs"]},
        {"key": "000001", "number": 6},
        {"source_name": "0.jpg", "number": 5, "captions": ["five dogs"]},
        {"key": "000009", "number": 4, "captions": ["four"]},
    ]
    (tmp_path / "counts.json").write_text(json.dumps(entries))
    evaluator = counting(file=str(tmp_path / "counts.json"), shards=str(shard))
    assert asked(evaluator) == [(2, "Four dogs", 4), (1, "six cats", 6), (0, "five dogs", 5)]
    assert evaluator.notices == ("file: 1 of 4 entries have no image in these shards (first: '000009')",)
    assert evaluator.skipped == ()
    assert evaluator.run(SmallEncoder(), World()).figures["num_missing"] == 1
    assert counting(file=str(tmp_path / "counts.json"), shards=str(shard), limit=2).notices == ()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[1", r"neither JSON nor JSON by line"),
        ("{}", r"a list of objects is needed, found an empty object"),
        ("7", r"a list of objects is needed, found a number"),
        ('["two"]', r"entry 0 is no object but a text"),
        ('[{"text": "two", "nmber": 2}]', r"entry 0: it has no key number; nearest: nmber"),
        ('[{"text": "two", "number": "2"}]', r"entry 0: number: found '2'; a whole number from 2 to 10 is needed"),
        ('[{"text": "two", "number": true}]', r"entry 0: number: found True; a whole number"),
        ('[{"text": "x", "number": 2.6}]', r"entry 0: number: found 2\.6; .* \(nearest: 3\)"),
        ('[{"text": "x", "number": NaN}]', r"entry 0: number: found nan; a whole number from 2 to 10 is needed$"),
        ('[{"text": "x", "number": 12}]', r"entry 0: number: found 12; .* from 2 to 10 is needed \(nearest: 10\)"),
        ('[{"text": "two", "number": 2}, {"txt": "two", "number": 2}]', r"entry 1: it has no key text; nearest: txt"),
        ('[{"text": 3, "number": 3}]', r"entry 0: text: found 3; a list of 1 or more texts is needed"),
        ('[{"caption": "a", "negative_caption": "b"}]', r"entry 0: it has negative_caption: .*kind: compositional"),
        ('{"add_obj": [{"caption": "a"}]}', r"an object of lists, as SugarCrepe's.*kind: compositional"),
        ('[{"text": "two", "number": 2, "image": "../two.jpg"}]', r"does not lie below"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str, line: str) -> None:
    (tmp_path / "bench.json").write_text(content)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=line) as caught:
        counting(file=str(tmp_path / "bench.json"), images=str(tmp_path / "images"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(("file: ", "images: "))


@pytest.mark.skipif(
    not (REAL / "countbench.json").is_file(), reason="set VLM_TEST_DATA to a folder with countbench.json"
)
def test_every_caption_of_countbench_has_its_word(tmp_path: Path) -> None:
    entries = json.loads((REAL / "countbench.json").read_text())
    for place in range(len(entries)):
        (tmp_path / f"{place:04d}.jpg").write_bytes(picture(0, (8, 8)))
    evaluator = counting(file=str(REAL / "countbench.json"), images=str(tmp_path))
    assert len(asked(evaluator)) == 540
    assert (evaluator.notices, evaluator.skipped) == ((), ())
    for question in evaluator._questions.asked:
        assert len(set(question.texts)) == 9
