"""Retrieval against a double loop over pairs in float64: any number of ranks, captions an image, rows a batch."""

import json
import statistics
from pathlib import Path

import pytest
from PIL import Image

from data.loading.heldout import HeldOutSet
from eval.examples import Examples, RetrievalExample
from eval.retrieval import Retrieval, RetrievalConfig, RetrievalExamples
from tests.data.small_shards import SAMPLE, sample, write_shard
from tests.data.small_shards import picture as picture_of
from tests.eval.encoders import CONTEXT, IMAGE, PointEncoder, SmallEncoder, captioned_shard, embed
from tests.ranks import run_ranks
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.sealed import read_json_object

# Uneven numbers of captions; sample 4 has none; the picture of sample 6 is broken.
# The captions of samples 3, 5 and 11 end with one and the same, 13's are that twice.
CAPTIONS = [[f"{n} {'abcdefgh'[(n * k) % 8] * 3} {k}" for k in range(0 if n == 4 else 1 + n % 4)] for n in range(19)]
for sharing in (3, 5, 11):
    CAPTIONS[sharing][-1] = "shared words"
CAPTIONS[13] = ["shared words", "shared words"]
BROKEN = (6,)


def evaluation(pattern: str, batch_size: int = 5, tile: int = 4) -> Retrieval:
    config = RetrievalConfig(kind="retrieval", shards=pattern, batch_size=batch_size, tile=tile)
    return Retrieval(config, CONTEXT)


def brute_force(pattern: str) -> dict[str, float]:
    """Both directions, straight from the definition."""
    batches = list(HeldOutSet(pattern, IMAGE).batches(World(), 1))
    usable = [n for n in range(len(CAPTIONS)) if CAPTIONS[n] and n not in BROKEN]
    texts = [caption for n in usable for caption in CAPTIONS[n]]
    image, text = (rows.tolist() for rows in embed(SmallEncoder(), [batches[n].images[0] for n in usable], texts))
    similar = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in text] for x in image]
    to_text, to_image = [], []
    for i, n in enumerate(usable):
        best = max(similar[i][j] for j, words in enumerate(texts) if words in CAPTIONS[n])
        to_text.append(1 + sum(similar[i][j] >= best for j, words in enumerate(texts) if words not in CAPTIONS[n]))
    for j, words in enumerate(texts):
        right = [i for i, n in enumerate(usable) if words in CAPTIONS[n]]
        best = max(similar[i][j] for i in right)
        to_image.append(1 + sum(similar[i][j] >= best for i in range(len(usable)) if i not in right))
    figures: dict[str, float] = {}
    for name, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
        for most in (1, 5, 10):
            figures[f"{name}_r@{most}"] = sum(rank <= most for rank in ranks) / len(ranks)
        figures[f"{name}_median_rank"] = statistics.median(ranks)
    return {**figures, "num_images": len(usable), "num_texts": len(texts), "num_skipped": 2}


def on_this_rank(pattern: str, batch_size: int, tile: int) -> dict[str, float]:
    return evaluation(pattern, batch_size, tile).run(SmallEncoder(), World.current()).figures


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("tile", [1, 5, 1024])
def test_one_process_equals_the_double_loop(tmp_path: Path, batch_size: int, tile: int) -> None:
    pattern = captioned_shard(tmp_path, CAPTIONS, BROKEN)
    expected = brute_force(pattern)
    assert 0 < expected["image_to_text_r@5"] < 1
    assert 0 < expected["text_to_image_r@5"] < 1
    assert on_this_rank(pattern, batch_size, tile) == expected


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 3), (3, 4), (3, 64)])
def test_every_rank_of_any_number_gets_the_same_figures(tmp_path: Path, world_size: int, batch_size: int) -> None:
    pattern = captioned_shard(tmp_path, CAPTIONS, BROKEN)
    assert run_ranks(on_this_rank, world_size, pattern, batch_size, 4) == [brute_force(pattern)] * world_size


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_collapsed_model_finds_nothing(tmp_path: Path, value: float) -> None:
    figures = evaluation(captioned_shard(tmp_path, CAPTIONS, BROKEN)).run(PointEncoder(value), World()).figures
    assert [figures[f"{way}_r@{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)] == [0.0] * 6
    assert figures["text_to_image_median_rank"] == figures["num_images"]


def test_captions_of_several_images_are_told(tmp_path: Path) -> None:
    (line,) = evaluation(captioned_shard(tmp_path, CAPTIONS, BROKEN)).notices
    assert line == (
        "shards: 1 caption is the same for several images, each a right answer to all of them: "
        "'shared words' (samples 000003, 000005), ..."
    )
    assert evaluation(captioned_shard(tmp_path, CAPTIONS[:5])).notices == ()


def examples_of(pattern: str, count: int) -> Examples[RetrievalExample]:
    examples = evaluation(pattern).run(SmallEncoder(), World()).examples
    assert isinstance(examples, RetrievalExamples)
    return examples.choose(count)


def test_examples_are_the_best_and_worst_images_with_what_they_found(tmp_path: Path) -> None:
    pattern = captioned_shard(tmp_path, CAPTIONS, BROKEN)
    examples = examples_of(pattern, 3)
    ranks = {"best": [e.rank for e in examples.best], "worst": [e.rank for e in examples.worst]}
    assert ranks["best"] == sorted(ranks["best"])
    assert ranks["worst"] == sorted(ranks["worst"], reverse=True)
    assert ranks["best"][0] == 1
    assert ranks["worst"][0] > 10
    for example in [*examples.best, *examples.worst]:
        scores = [found.score for found in example.retrieved]
        assert scores == sorted(scores, reverse=True)
        assert [found.correct for found in example.retrieved] == [f.text in example.captions for f in example.retrieved]
        place = next((n for n, found in enumerate(example.retrieved) if found.correct), None)
        assert example.rank == place + 1 if place is not None else example.rank > 5


def test_written_examples_replace_older_ones_whole(tmp_path: Path) -> None:
    examples = examples_of(captioned_shard(tmp_path, CAPTIONS), 2)
    folder = tmp_path / "examples" / "val"
    folder.mkdir(parents=True)
    (folder / "000.jpg").write_bytes(b"old")
    (folder / "note.txt").write_text("somebody's own")
    written = examples.write(folder)
    listing = read_json_object(folder / "examples.json")
    assert {kind: [entry["rank"] for entry in entries] for kind, entries in listing.items()} == {
        "best": [e.rank for e in examples.best],
        "worst": [e.rank for e in examples.worst],
    }
    names = [entry["image"] for entries in listing.values() for entry in entries]
    assert {path.name for path in folder.iterdir()} == {*names, "examples.json", "note.txt"}
    assert set(written) == {folder / name for name in ("examples.json", *names)}
    assert [path.name for path in folder.parent.iterdir()] == ["val"]
    assert set(listing["best"][0]["retrieved"][0]) == {"text", "correct", "score"}
    with Image.open(folder / names[0]) as image:
        assert (image.format, image.size) == ("JPEG", (40, 32))


def test_shards_without_captions_or_without_a_readable_sample_are_refused(tmp_path: Path) -> None:
    bare = write_shard(tmp_path / "bare.tar", [sample(0, jpg=b"x", cls=1)])
    with pytest.raises(UserError, match=r"^shards: no sample of .*bare\.tar has a caption"):
        evaluation(str(bare))
    broken = captioned_shard(tmp_path, CAPTIONS[:2], broken=(0, 1))
    with pytest.raises(UserError, match=r"^shards: none of the 2 samples has a readable image and caption"):
        evaluation(broken).run(SmallEncoder(), World())


def test_a_public_set_scores_as_the_same_captions_in_json_and_says_how_it_was_read(tmp_path: Path) -> None:
    texts = [[f"{n} {'abcdefgh'[n % 8] * 3} {k}" for k in range(2 + n % 3)] for n in range(8)]
    images = [sample(n, jpg=picture_of(n)) for n in range(8)]
    in_json: list[SAMPLE] = [
        {**one, "json": json.dumps({"captions": captions})} for one, captions in zip(images, texts, strict=True)
    ]
    in_lines: list[SAMPLE] = [{**one, "txt": "\n".join(captions)} for one, captions in zip(images, texts, strict=True)]
    first = evaluation(str(write_shard(tmp_path / "json.tar", in_json)))
    second = evaluation(str(write_shard(tmp_path / "lines.tar", in_lines)))
    assert first.run(SmallEncoder(), World()).figures == second.run(SmallEncoder(), World()).figures
    assert first.notices == ()
    assert second.notices == (
        "shards: each line of a txt member is a caption, as in public retrieval sets; txt: whole reads it as one",
    )
