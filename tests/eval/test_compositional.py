"""Composition against loops over images and texts in float64, on other ranks, and on the files of benchmarks."""

import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.images.views import evaluation_view
from eval.compositional import Compositional, CompositionalConfig
from eval.evaluator import EvaluationContext
from tests.data.small_shards import picture, sample, with_json, write_shard
from tests.eval.encoders import CONTEXT, IMAGE, PointEncoder, SmallEncoder, embed
from tests.eval.test_generative import drawn_model, letters
from tests.ranks import run_ranks
from vlm.distributed.world import World
from vlm.errors import UserError

REAL = Path(os.environ.get("VLM_TEST_DATA", "missing"))
CAPTIONS = ["a red cat", "two blue dogs sit", "a bird", "old men", "green", "a small car in snow", "tea", "hot soup"]


def negatives_of(place: int) -> dict[str, list[str]]:
    """One to three wrong captions of one or two kinds, shorter ones and longer ones."""
    word = f"{CAPTIONS[place - 3]} {place}"[: len(CAPTIONS[place])]
    of_place = {"swap words": [word, f"{word}!", word[:2]][: 1 + place % 3], "add": [f"{CAPTIONS[place]} {place}"]}
    return of_place if place % 2 else {"swap words": of_place["swap words"]}


def negatives_shard(folder: Path) -> str:
    """Pictures with wrong captions by kind; without any, with a true one, no picture, a number for a text."""
    samples = [
        with_json(place, captions=[caption, "not read"], negatives=negatives_of(place))
        for place, caption in enumerate(CAPTIONS)
    ]
    others = [
        with_json(20, captions=["alone"]),
        with_json(23, captions=["a mouse", "Such a mouse!"], negatives=["such a MOUSE"]),
        sample(21, jpg=b"broken", json=json.dumps({"captions": ["a"], "negatives": ["b"]})),
        with_json(22, captions=["a number"], negatives=[3]),
    ]
    return str(write_shard(folder / "negatives.tar", [*samples[:3], *others, *samples[3:]]))


QUESTIONS = [
    (place, kind.replace(" ", "_"), [CAPTIONS[place], *wrong])
    for place in range(len(CAPTIONS))
    for kind, wrong in negatives_of(place).items()
]


def compositional(context: EvaluationContext = CONTEXT, batch_size: int = 4, **keys: Any) -> Compositional:
    config = CompositionalConfig.model_validate({"kind": "compositional", "batch_size": batch_size, **keys})
    config.check_files(None, str)
    return Compositional(config, context)


def expected(score: Callable[[int, str], float]) -> tuple[float, dict[str, float]]:
    """How often the true caption scores more than all others: of all questions, and by kind."""
    hits = defaultdict(list)
    for place, kind, (true, *others) in QUESTIONS:
        hits[kind].append(all(score(place, true) > score(place, other) for other in others))
    everything = [hit for of_kind in hits.values() for hit in of_kind]
    return sum(everything) / len(everything), {kind: sum(of_kind) / len(of_kind) for kind, of_kind in hits.items()}


def views(size: Any = IMAGE) -> list[Tensor]:
    return [
        torch.from_numpy(evaluation_view(picture(place), size).copy()).permute(2, 0, 1)
        for place in range(len(CAPTIONS))
    ]


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_figures_are_those_of_a_loop(tmp_path: Path, batch_size: int) -> None:
    evaluator = compositional(batch_size=batch_size, shards=negatives_shard(tmp_path))
    found = evaluator.run(SmallEncoder(), World())
    figures = found.figures
    images, _ = embed(SmallEncoder(), views(), ["x"])
    mean = torch.stack([sum(row[d] for row in images) / len(images) for d in range(images.shape[1])])

    def text(words: str) -> Tensor:
        return embed(SmallEncoder(), views()[:1], [words])[1][0]

    ways: dict[str, Callable[[int, str], float]] = {
        "accuracy": lambda place, words: dot(images[place], text(words)),
        "mean_image_accuracy": lambda _, words: dot(mean, text(words)),
        "shorter_wins": lambda _, words: -len(words),
        "longer_wins": lambda _, words: len(words),
    }
    table = found.tables["kinds"]
    labels = {metric.name: metric.label for metric in evaluator.metrics}
    for name, score in ways.items():
        overall, by_kind = expected(score)
        assert figures[name] == pytest.approx(overall), name
        column = list(table.columns).index(labels[name])
        assert {kind: row[column] for kind, row in table.rows.items()} == pytest.approx(by_kind)
        if name == "accuracy":
            assert {kind: figures[f"accuracy_{kind}"] for kind in by_kind} == pytest.approx(by_kind)
            assert figures["macro_accuracy"] == pytest.approx(sum(by_kind.values()) / len(by_kind))
    assert figures["chance"] == pytest.approx(sum(1 / len(texts) for _, _, texts in QUESTIONS) / len(QUESTIONS))
    counts = {"num_samples": len(QUESTIONS), "num_skipped": 2, "num_missing": 0}
    assert {name: figures[name] for name in counts} == counts
    assert {kind: row[0] for kind, row in table.rows.items()} == {"swap_words": 8, "add": 4}
    assert 0 < figures["accuracy"] < 1
    assert figures.keys() <= {metric.name for metric in evaluator.metrics}
    assert evaluator.notices == (
        "shards: 2 of 12 samples ask nothing: 2 with no negatives in their json that are wrong",
    )
    assert [skip.key for skip in evaluator.skipped] == ["000022", "000021"]


def by_decoder(shard: str, batch_size: int) -> tuple[dict[str, float], dict[str, Sequence[float]]]:
    model = drawn_model()
    evaluator = compositional(EvaluationContext(model.image_spec, letters), batch_size, shards=shard)
    found = evaluator.run(model, World.current())
    return found.figures, dict(found.tables["kinds"].rows)


def test_the_decoder_is_asked_with_the_image_and_without(tmp_path: Path) -> None:
    """Each text under each image by itself, in float64."""
    model = drawn_model().double()
    spec = model.image_spec
    mean = torch.tensor([round(255 * value) for value in spec.mean], dtype=torch.uint8)
    with torch.no_grad():
        shown = [model.encode_image_and_tokens(view[None])[1] for view in views(spec)]
        blind = model.encode_image_and_tokens(mean[None, :, None, None].expand(1, 3, spec.size, spec.size))[1]

        def likelihood(tokens: Tensor, words: str) -> float:
            return float(model.caption_likelihood(tokens, *letters([words])))

        ways: dict[str, Callable[[int, str], float]] = {
            "decoder_accuracy": lambda place, words: likelihood(shown[place], words),
            "decoder_blind_accuracy": lambda _, words: likelihood(blind, words),
            "decoder_gain_accuracy": lambda place, words: likelihood(shown[place], words) - likelihood(blind, words),
        }
        wanted = {name: expected(score) for name, score in ways.items()}
    figures, kinds = by_decoder(negatives_shard(tmp_path), 5)
    for name, (overall, by_kind) in wanted.items():
        assert figures[name] == pytest.approx(overall), name
        column = list(ways).index(name) - 3
        assert {kind: row[column] for kind, row in kinds.items()} == pytest.approx(by_kind), name
    assert len({str(one) for one in wanted.values()}) == 3
    without = compositional(EvaluationContext(spec, letters), 5, shards=negatives_shard(tmp_path), decoder=False)
    assert not any(name.startswith("decoder") for name in without.run(drawn_model(), World()).figures)


@pytest.mark.slow
def test_every_rank_gets_the_same_figures(tmp_path: Path) -> None:
    shard = negatives_shard(tmp_path)
    assert run_ranks(by_decoder, 3, shard, 5) == [by_decoder(shard, 8)] * 3


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_ties_are_misses(tmp_path: Path, value: float) -> None:
    figures = compositional(shards=negatives_shard(tmp_path)).run(PointEncoder(value), World()).figures
    assert [figures[name] for name in ("accuracy", "macro_accuracy", "mean_image_accuracy")] == [0, 0, 0]


def write_images(folder: Path, names: Sequence[str]) -> str:
    (folder / "images").mkdir()
    for number, name in enumerate(names):
        (folder / "images" / name).write_bytes(picture(number, (40, 32), "PNG"))
    return str(folder / "images")


def asked(evaluator: Compositional) -> list[tuple[int, tuple[str, ...], str]]:
    return [(one.image, one.texts, one.kind) for one in evaluator._questions.asked]


def test_sugarcrepe_in_one_file_or_several(tmp_path: Path) -> None:
    """An object of lists by kind, or the published files of one kind each; images in a folder, or in shards by name."""

    def entry(number: int) -> dict[str, str]:
        return {"filename": f"{number}.jpg", "caption": f"true {number}", "negative_caption": f"false {number}"}

    (tmp_path / "all.json").write_text(json.dumps({"add_att": [entry(2), entry(7)], "swap_obj": [entry(1), entry(2)]}))
    for kind, pair in {"add_att": (2, 7), "swap_obj": (1, 2)}.items():
        stored = {str(place): entry(number) for place, number in enumerate(pair)}
        (tmp_path / f"{kind}.json").write_text(json.dumps(stored))
    several = [str(tmp_path / f"{kind}.json") for kind in ("add_att", "swap_obj")]
    images = write_images(tmp_path, ["1.jpg", "2.jpg"])
    shard = write_shard(tmp_path / "a.tar", [with_json(n, captions=["x"], source_name=f"{n}.jpg") for n in range(3)])
    for keys in ({"file": str(tmp_path / "all.json")}, {"file": several}):
        in_folder, in_shards = compositional(**keys, images=images), compositional(**keys, shards=str(shard))
        wanted = [
            ("true 2", "false 2", "add_att"),
            ("true 1", "false 1", "swap_obj"),
            ("true 2", "false 2", "swap_obj"),
        ]
        for evaluator, numbers in ((in_folder, [0, 1, 0]), (in_shards, [2, 1, 2])):
            assert asked(evaluator) == [(n, texts[:2], texts[2]) for n, texts in zip(numbers, wanted, strict=True)]
            assert evaluator.run(SmallEncoder(), World()).figures["num_missing"] == 1
            assert [metric.name for metric in evaluator.metrics][-2:] == ["accuracy_swap_obj", "accuracy_add_att"]
        assert in_folder.notices == (f"file: 1 of 4 entries have no image in {images} (first: '7.jpg')",)
        assert (in_folder.skipped, in_shards.skipped) == ((), ())


def test_aro_looks_at_the_box_alone(tmp_path: Path) -> None:
    images = write_images(tmp_path, ["0.png", "1.png"])
    box = {"bbox_x": 5, "bbox_y": 3, "bbox_w": 20, "bbox_h": 25}
    texts = {"true_caption": "the cat is on the mat", "false_caption": "the mat is on the cat"}
    entries = [
        {"image_path": "0.png", **texts, **box, "relation_name": "on top of"},
        {"image_path": "1.png", **texts, **box, "bbox_x": 400, "relation_name": "in"},
        {"image_path": "1.png", **texts, "attributes": ["old", "red"]},
    ]
    (tmp_path / "aro.json").write_text(json.dumps(entries))
    evaluator = compositional(file=str(tmp_path / "aro.json"), images=images, batch_size=1)
    assert [(number, kind) for number, _, kind in asked(evaluator)] == [(0, "on_top_of"), (1, "in"), (2, "old_red")]
    shown = next(iter(evaluator._questions.images.batches(World(), 1))).images[0]
    cut = io.BytesIO()
    Image.open(tmp_path / "images" / "0.png").crop((5, 3, 25, 28)).save(cut, "PNG")
    assert torch.equal(shown.permute(1, 2, 0), torch.from_numpy(evaluation_view(cut.getvalue(), IMAGE).copy()))
    assert evaluator.run(SmallEncoder(), World()).figures["num_skipped"] == 1
    assert [skip.reason for skip in evaluator.skipped] == [
        "its box (400, 3, 420, 28) lies outside its image of 40 x 32 pixels"
    ]
    shard = str(write_shard(tmp_path / "a.tar", [{"__key__": "0", "jpg": picture(0)}]))
    with pytest.raises(
        UserError, match=r"^file: .*aro.json: entry 0 means a part of an image, which cannot be had of shards"
    ):
        compositional(file=str(tmp_path / "aro.json"), shards=shard)


def test_aro_orders(tmp_path: Path) -> None:
    options = ["a b c", "c b a", "b a c", "a c b", "c a b"]
    (tmp_path / "coco_order.json").write_text(json.dumps([{"image": "0.jpg", "caption_options": options}]))
    evaluator = compositional(file=str(tmp_path / "coco_order.json"), images=write_images(tmp_path, ["0.jpg"]))
    assert asked(evaluator) == [(0, tuple(options), "coco_order")]
    assert evaluator.run(SmallEncoder(), World()).figures["chance"] == 0.2


def test_winoground_asks_both_ways(tmp_path: Path) -> None:
    """Text, image and group scores of a loop; of the last example an image is missing."""
    names = [f"ex_{example}_img_{which}.png" for example in range(12) for which in (0, 1)]
    images = write_images(tmp_path, names)
    lines: list[dict[str, Any]] = [
        {
            "id": example,
            **{f"image_{which}": f"ex_{example}_img_{which}" for which in (0, 1)},
            "caption_0": f"{chr(97 + example)}, {CAPTIONS[example % 8]}",
            "caption_1": f"{chr(110 + example)}: {CAPTIONS[-1 - example % 5]}",
            "collapsed_tag": "Object" if example % 2 else "Relation",
        }
        for example in range(13)
    ]
    lines[12]["image_0"] = "ex_3_img_0"
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compositional(file=str(tmp_path / "examples.jsonl"), images=images).run(SmallEncoder(), World()).figures
    shown = [
        torch.from_numpy(evaluation_view((tmp_path / "images" / name).read_bytes(), IMAGE).copy()).permute(2, 0, 1)
        for name in names
    ]
    text = image = group = pairs = 0
    for example, line in enumerate(lines[:12]):
        i, c = embed(SmallEncoder(), shown[2 * example : 2 * example + 2], [line["caption_0"], line["caption_1"]])
        s = [[dot(i[b], c[a]) for b in (0, 1)] for a in (0, 1)]  # s[caption][image]
        text_right = s[0][0] > s[1][0] and s[1][1] > s[0][1]
        image_right = s[0][0] > s[0][1] and s[1][1] > s[1][0]
        pairs += (s[0][0] > s[1][0]) + (s[1][1] > s[0][1])
        text, image, group = text + text_right, image + image_right, group + (text_right and image_right)
    assert found["text_score"] == pytest.approx(text / 12)
    assert found["image_score"] == pytest.approx(image / 12)
    assert found["group_score"] == pytest.approx(group / 12)
    assert 0 < group < 12
    i, c = embed(SmallEncoder(), [shown[6]], [lines[12]["caption_0"], lines[12]["caption_1"]])
    assert found["accuracy"] == pytest.approx((pairs + (dot(i[0], c[0]) > dot(i[0], c[1]))) / 25)
    assert (found["num_samples"], found["num_missing"]) == (25, 1)
    assert {name for name in found if name.startswith("accuracy_")} == {"accuracy_Object", "accuracy_Relation"}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[{"image_url": "u", "text": "two", "number": 2}]', r"entry 0: it has a number: .*\(kind: counting\)"),
        ('[{"image": "a.jpg", "text": "b"}]', r'entry 0: no known format has its keys .*"image", "text".*SugarCrepe'),
        (
            '{"add": [{"caption": "a", "negative_caption": "b"}]}',
            r"add 0: it has no key filename; choose from: caption",
        ),
        ('{"add": [{"filename": "a", "caption": " ", "negative_caption": "b"}]}', r"add 0: caption: found ' '; a text"),
        ('[{"image_path": "a", "true_caption": "b", "false_captions": "c"}]', r"no key false_caption; nearest: false_"),
        ('[{"image": "a", "caption_options": ["b"]}]', r"caption_options: found \['b'\]; a list of 2 or more texts"),
        (
            '[{"image_path": "a", "true_caption": "b", "false_caption": "c", "bbox_x": 1, "bbox_y": 1, "bbox_w": 0}]',
            r"entry 0: bbox_w: found 0; a whole number from 1 to 1000000 is needed \(nearest: 1\)",
        ),
        ('{"add": []}', r"a list of objects is needed, found an empty list"),
        ("nothing", r"neither JSON nor JSON by line"),
        (None, r"there is no such file"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str | None, line: str) -> None:
    """And it is told before there is a model."""
    if content is not None:
        (tmp_path / "bench.json").write_text(content)
    (tmp_path / "images").mkdir()
    keys = {"file": str(tmp_path / "bench.json"), "images": str(tmp_path / "images")}
    config = CompositionalConfig.model_validate({"kind": "compositional", **keys})
    with pytest.raises(UserError, match=line) as caught:
        config.check_files(None, "--{}".format)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--file: ")


def test_folders_and_shards_that_hold_nothing_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # of a long path only the beginning is shown
    entry = {"filename": "a.jpg", "caption": "a", "negative_caption": "b"}
    (tmp_path / "bench.json").write_text(json.dumps({"add": [entry]}))
    with pytest.raises(UserError, match=r"^images: 'nowhere': there is no such folder"):
        compositional(file=str(tmp_path / "bench.json"), images="nowhere")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"^file: 1 of 1 entries have no image in .*images \(first: 'a.jpg'\): nothing"):
        compositional(file=str(tmp_path / "bench.json"), images=str(tmp_path / "images"))
    (tmp_path / "images" / "a.jpg").write_bytes(b"broken")
    broken = compositional(file=str(tmp_path / "bench.json"), images=str(tmp_path / "images"))
    with pytest.raises(UserError, match=r"^file: none of the images of 1 questions can be read$"):
        broken.run(SmallEncoder(), World())
    with pytest.raises(
        UserError, match=r"^shards: 1 of 1 samples ask nothing: 1 with no negatives in their json that are wrong$"
    ):
        compositional(shards=str(write_shard(tmp_path / "a.tar", [sample(0)])))


@pytest.mark.skipif(
    not (REAL / "sugarcrepe.json").is_file(), reason="set VLM_TEST_DATA to a folder with sugarcrepe.json"
)
def test_sugarcrepe_finds_its_images_among_those_of_coco_mini() -> None:
    evaluator = compositional(
        file=str(REAL / "sugarcrepe.json"), shards=str(REAL / "coco-mini-val-000000.tar"), batch_size=32
    )
    found = evaluator.run(SmallEncoder(), World())
    assert (found.figures["num_samples"], found.figures["num_missing"]) == (83, 7511 - 83)
    assert len({image for image, _, _ in asked(evaluator)}) == 22
    assert sum(row[0] for row in found.tables["kinds"].rows.values()) == 83
    assert len(found.tables["kinds"].rows) == 7
