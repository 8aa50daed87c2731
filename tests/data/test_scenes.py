"""Promises of the scenes, judged from the written shards by a reader of English that knows nothing of their making."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.scenes.shapes import OUTLINES
from data.scenes.splits import SPLITS
from data.scenes.vocabulary import BACKGROUNDS, CLEAR_BACKGROUNDS, COLOURS, NUMBER_WORDS, contrast
from data.scenes.writer import ScenesOptions, ScenesSummary, sample_of, write_scenes, write_shard
from vlm.aside import folder_aside
from vlm.errors import UserError

SHARD = 150  # samples, of the splits that have several shards
Truth = dict[str, Any]
Sample = dict[str, Any]
NUMBERS = {word: i for i, word in enumerate(("a", *NUMBER_WORDS[2:]), start=1)}
NUMBERS |= {"one": 1, **{str(i): i for i in range(2, 11)}}
SIZES = {
    "small": "small",
    "little": "small",
    "tiny": "small",
    "medium-sized": "medium",
    "large": "large",
    "big": "large",
}
PLACES = {
    "top": (None, 0),
    "bottom": (None, 2),
    "left": (0, None),
    "right": (2, None),
    "upper": (None, 0),
    "lower": (None, 2),
}
RELATIONS = {
    "to the left of": (-1, 0),
    "left of": (-1, 0),
    "to the right of": (1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "over": (0, -1),
    "below": (0, 1),
    "under": (0, 1),
}
NOUN = re.compile(
    rf"\b(?P<count>{'|'.join(NUMBERS)}) (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<colour>{'|'.join(COLOURS)}) )?"
    rf"(?P<shape>{'|'.join(OUTLINES)})(?P<plural>e?s)?\b"
)


@dataclass(frozen=True)
class Said:
    """A caption as a reader understands it."""

    nouns: tuple[tuple[int, str | None, str | None, str], ...]
    direction: tuple[int, int] | None
    place: tuple[int, int] | None
    line: str | None
    background: str | None


def read(caption: str) -> Said:
    """Understand a caption, and insist on good English: plurals, verbs, nothing left over."""
    rest = caption
    found = list(NOUN.finditer(caption))
    nouns = []
    for noun in found:
        count = NUMBERS[noun["count"]]
        assert bool(noun["plural"]) == (count > 1), caption
        assert noun["plural"] in (None, "es" if noun["shape"] == "cross" else "s"), caption
        nouns.append((count, SIZES.get(noun["size"] or ""), noun["colour"], noun["shape"]))
    if opening := re.match(r"there (is|are) |an? (picture|image|scene|drawing) (of|with) ", caption):
        rest = rest.removeprefix(opening[0])
        assert opening[1] in (None, "is" if nouns[0][0] == 1 else "are"), caption
    direction = None
    if len(found) == 2 and (words := caption[found[0].end() : found[1].start()].strip()) in RELATIONS:
        direction = RELATIONS[words]
    rest = NOUN.sub("", rest)
    background = None
    if match := re.search(rf" (?:on|against) a ({'|'.join(BACKGROUNDS)}) background", rest):
        background, rest = match[1], rest.replace(match[0], "")
    line = None
    if match := re.search(r" in a (row|column)$", rest):
        line, rest = match[1], rest.replace(match[0], "")
    place = None
    rest = rest.strip()
    if direction is None and re.fullmatch(r"(in|at|near|on) the [a-z ]+", rest):
        horizontal, vertical = 1, 1
        for word in rest.split()[2:]:
            assert word in {*PLACES, "centre", "middle", "corner", "side"}, caption
            across, down = PLACES.get(word, (None, None))
            horizontal, vertical = (
                across if across is not None else horizontal,
                down if down is not None else vertical,
            )
        place, rest = (horizontal, vertical), ""
    assert rest in ("", *RELATIONS) or re.fullmatch(r"(, )*,? ?and", rest), (caption, rest)
    return Said(tuple(nouns), direction, place, line, background)


def is_true(said: Said, truth: Truth, exact: bool) -> bool:
    """Whether the objects bear it out; when not `exact`, "two circles" is also true of five."""
    if said.background not in (None, truth["background"]):
        return False
    groups = []
    for count, size, colour, shape in said.nouns:
        members = [
            o
            for o in truth["objects"]
            if o["shape"] == shape and colour in (None, o["colour"]) and size in (None, o["size"])
        ]
        if len(members) < count or (exact and colour is not None and len(members) != count):
            return False
        groups.append(members)
    if said.direction is not None:
        return any(stands(a, said.direction, b) for a in kinds(groups[0]) for b in kinds(groups[1]))
    if said.place is not None:
        return any(tuple(int(c * 3 // 64) for c in o["centre"]) == said.place for o in groups[0])
    if said.line is not None:
        axis = 1 if said.line == "row" else 0
        off = [o["centre"][axis] for o in groups[0]]
        return len(off) >= 3 and max(off) - min(off) <= max(o["box"][3] - o["box"][1] for o in groups[0]) / 2 + 0.5
    return True


def kinds(members: list[Truth]) -> list[list[Truth]]:
    """The members that look alike, together."""
    key = lambda o: (o["colour"], o["size"])  # noqa: E731
    return [list(alike) for _, alike in itertools.groupby(sorted(members, key=key), key=key)]


def stands(first: list[Truth], direction: tuple[int, int], second: list[Truth]) -> bool:
    offset = np.mean([o["centre"] for o in first], axis=0) - np.mean([o["centre"] for o in second], axis=0)
    return float(offset @ np.array(direction)) > 0


@pytest.fixture(scope="module")
def heard() -> list[int]:
    """The progress that the rendering of `scenes` reported."""
    return []


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory, heard: list[int]) -> ScenesSummary:
    empty = tmp_path_factory.mktemp("scenes")
    return write_scenes(empty, train=400, val=60, shard_size=SHARD, workers=2, progress=heard.append)


@pytest.fixture(scope="module")
def samples(scenes: ScenesSummary) -> dict[str, list[Sample]]:
    """Every sample of every split, as webdataset itself reads them; `json` is parsed, `jpg` stays bytes."""
    found: dict[str, list[Sample]] = {}
    for split, paths in scenes.shards.items():
        rows = []
        for path in paths:
            with path.open("rb") as stream:
                opened = tar_file_expander([{"url": str(path), "stream": stream}])
                rows += [dict(row, json=json.loads(row["json"])) for row in group_by_keys(opened)]
        found[split] = rows
    return found


def pixels(jpeg: bytes) -> NDArray[np.float64]:
    return np.asarray(Image.open(io.BytesIO(jpeg)), dtype=np.float64)


def test_the_same_bytes_from_any_number_of_processes(scenes: ScenesSummary, tmp_path: Path) -> None:
    """Those of two processes are made again in this one; of the large held-out shards the beginning."""
    jobs = ScenesOptions(train=400, val=60, seed=0, image_size=64, shard_size=SHARD).jobs(tmp_path)
    assert {job.path.name for job in jobs} == {path.name for path in scenes.directory.glob("*.tar")}
    for job in jobs:
        write_shard(replace(job, stop=min(job.stop, job.start + SHARD)))
        ours, theirs = job.path.read_bytes(), (scenes.directory / job.path.name).read_bytes()
        assert ours == theirs if job.stop - job.start <= SHARD else theirs.startswith(ours.rstrip(b"\0")), job.path.name


def test_the_progress_counts_every_sample(scenes: ScenesSummary, heard: list[int]) -> None:
    assert sum(heard) == sum(scenes.num_samples.values())


def test_splits_have_the_sizes_asked_for_and_keys_of_their_own(
    scenes: ScenesSummary, samples: dict[str, list[Sample]]
) -> None:
    assert {name: len(rows) for name, rows in samples.items()} == scenes.num_samples
    assert scenes.num_samples["train"] == 400
    assert [p.name for p in scenes.shards["train"]] == [f"train-{i:06d}.tar" for i in range(3)]
    keys = [row["__key__"] for rows in samples.values() for row in rows]
    assert len(set(keys)) == len(keys)


def test_no_image_comes_twice(samples: dict[str, list[Sample]]) -> None:
    digests = [sha256(row["jpg"]).digest() for rows in samples.values() for row in rows]
    assert len(set(digests)) == len(digests)


def test_a_sample_depends_on_seed_and_place_only(samples: dict[str, list[Sample]]) -> None:
    """Not on how many samples there are, nor on the cut into shards; another seed gives another sample."""
    written = samples["train"][170]
    (again,), (other,) = (SPLITS["train"].plan(seed, "train", 170, 171) for seed in (0, 7))
    assert sample_of(again, 64)["jpg"] == written["jpg"]
    assert sample_of(other, 64)["jpg"] != written["jpg"]


def test_a_larger_image_shows_the_same_scene(samples: dict[str, list[Sample]]) -> None:
    small = samples["train"][3]
    (plan,) = SPLITS["train"].plan(0, "train", 3, 4)
    large = sample_of(plan, 128)
    truth = json.loads(large["json"])
    assert truth["captions"] == small["json"]["captions"]
    box = np.array(small["json"]["objects"][0]["box"])
    assert np.array(truth["objects"][0]["box"]) == pytest.approx(2 * box, abs=0.02)
    assert isinstance(large["jpg"], bytes)
    halved = pixels(large["jpg"]).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - pixels(small["jpg"])).mean() < 3


@pytest.mark.parametrize("split", ["train", "val", "zeroshot", "retrieval", "counting"])
def test_every_caption_is_true_english(samples: dict[str, list[Sample]], split: str) -> None:
    for row in samples[split]:
        captions = row["json"]["captions"]
        assert len(set(captions)) == len(captions) >= 2
        for caption in captions:
            assert is_true(read(caption), row["json"], exact=True), (caption, row["json"])


def test_training_captions_vary_and_one_says_everything(samples: dict[str, list[Sample]]) -> None:
    for row in samples["train"]:
        truth = row["json"]
        assert 3 <= len(truth["captions"]) <= 5
        said = read(truth["captions"][0])
        assert said.background == truth["background"]
        assert sorted((n, f"{colour} {shape}") for n, _, colour, shape in said.nouns) == sorted(
            (n, kind) for kind, n in truth["counts"].items()
        )
        assert (said.direction is not None) == (truth["relation"] is not None)
        assert (said.place is not None) == (truth["count"] == 1)
    everything = [caption for row in samples["train"] for caption in row["json"]["captions"]]
    assert len(set(everything)) > 0.8 * len(everything)


def test_each_retrieval_caption_is_true_of_one_image_only(samples: dict[str, list[Sample]]) -> None:
    truths = [row["json"] for row in samples["retrieval"]]
    assert len(truths) == 1000
    kinds_of = [set(truth["counts"]) for truth in truths]
    for index, truth in enumerate(truths):
        for caption in truth["captions"]:
            said = read(caption)
            named = {f"{colour} {shape}" for _, _, colour, shape in said.nouns}
            rivals = (i for i, present in enumerate(kinds_of) if named <= present)
            assert [i for i in rivals if is_true(said, truths[i], exact=False)] == [index], caption


def test_zeroshot_classes_are_balanced_and_named(scenes: ScenesSummary, samples: dict[str, list[Sample]]) -> None:
    described = json.loads(scenes.classes.read_text())
    classes = described["classes"]
    assert len(classes) == len(set(classes)) >= 64
    assert all(template.format("red circle").count("red circle") == 1 for template in described["templates"])
    per_class = Counter(int(row["cls"]) for row in samples["zeroshot"])
    assert set(per_class) == set(range(len(classes)))
    assert 20 <= min(per_class.values()) == max(per_class.values()) <= 30
    for row in samples["zeroshot"]:
        assert row["json"]["counts"] == {classes[int(row["cls"])]: 1}


def test_counting_is_balanced_and_size_does_not_give_the_number_away(samples: dict[str, list[Sample]]) -> None:
    sides: dict[int, list[float]] = {number: [] for number in range(1, 11)}
    for row in samples["counting"]:
        truth = row["json"]
        number = int(row["cls"]) + 1
        assert truth["count"] == len(truth["objects"]) == sum(truth["counts"].values()) == number
        assert len(truth["counts"]) == 1
        assert all(read(caption).nouns[0][0] == number for caption in truth["captions"])
        sides[number].append(truth["objects"][0]["box"][2] - truth["objects"][0]["box"][0])
    assert {len(found) for found in sides.values()} == {100}
    means = [float(np.mean(found)) for found in sides.values()]
    assert max(means) - min(means) < 1.2, means


def test_objects_lie_inside_apart_and_large_enough(samples: dict[str, list[Sample]]) -> None:
    for row in itertools.chain.from_iterable(samples.values()):
        objects = row["json"]["objects"]
        assert 1 <= len(objects) <= 10
        boxes = [o["box"] for o in objects]
        for x0, y0, x1, y1 in boxes:
            assert x0 > 0
            assert y0 > 0
            assert x1 < 64
            assert y1 < 64
            assert max(x1 - x0, y1 - y0) >= 9
        for first, second in itertools.combinations(objects, 2):
            reach = min(o["box"][3] - o["box"][1] for o in (first, second))
            assert float(np.hypot(*np.subtract(first["centre"], second["centre"]))) > reach


def test_boxes_bound_the_pixels(samples: dict[str, list[Sample]]) -> None:
    overlaps = []
    for row in samples["zeroshot"]:
        thing, back = row["json"]["objects"][0], np.array(BACKGROUNDS[row["json"]["background"]])
        away = np.linalg.norm(pixels(row["jpg"]) - back, axis=-1)
        # Half way to the object's own colour: the gradient, the soft shadow and JPEG's ripples stay below it.
        ys, xs = np.nonzero(away > 0.5 * np.linalg.norm(np.array(COLOURS[thing["colour"]]) - back))
        overlaps.append(overlap((xs.min(), ys.min(), xs.max() + 1.0, ys.max() + 1.0), thing["box"]))
    assert float(np.quantile(overlaps, 0.05)) > 0.75  # thin tips fade at ten pixels
    assert float(np.mean(overlaps)) > 0.88


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    shared = np.prod(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]))
    areas = [np.prod(np.subtract(box[2:], box[:2])) for box in (first, second)]
    return float(shared / (sum(areas) - shared))


def test_contrast_is_the_cie_difference_and_leaves_a_background_for_any_four_colours() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(100, abs=1e-2)
    # sRGB red is L*a*b* (53.24, 80.09, 67.20), blue is (32.30, 79.19, -107.86).
    expected = np.linalg.norm(np.subtract((53.24, 80.09, 67.20), (32.30, 79.19, -107.86)))
    assert contrast((255, 0, 0), (0, 0, 255)) == pytest.approx(float(expected), abs=0.05)
    for four in itertools.combinations(COLOURS, 4):
        assert set.intersection(*(set(CLEAR_BACKGROUNDS[colour]) for colour in four))


def test_a_directory_that_holds_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty; name a new"):
        write_scenes(tmp_path, train=1, val=1)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unwritable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/scenes cannot be made: .*file is a file"):
        write_scenes(tmp_path / "file" / "scenes", train=1, val=1)
    with pytest.raises(UserError, match=r"file is a file, not a folder"):
        write_scenes(tmp_path / "file", train=1, val=1)


@pytest.mark.parametrize(
    ("key", "value"), [("train", 0), ("val", -1), ("image_size", 8), ("shard_size", 0), ("seed", -1), ("workers", 0)]
)
def test_impossible_values_are_named(tmp_path: Path, key: str, value: int) -> None:
    options: dict[str, int] = {"train": 1, "val": 1, key: value}
    with pytest.raises(UserError, match=f"{key} must be at least .*, found {value}"):
        write_scenes(tmp_path / "scenes", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_error_half_way_leaves_nothing(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise RuntimeError("the terminal went away")

    with pytest.raises(RuntimeError, match="went away"):
        write_scenes(tmp_path / "scenes", train=5, val=1, workers=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_directory_and_no_orphan(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; import sys; from data.scenes.writer import write_scenes\n"
        "write_scenes(Path(sys.argv[1]), train=20000, val=1, workers=2)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "scenes")], env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".scenes.*.partial/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not (tmp_path / "scenes").exists()
    with folder_aside(tmp_path / "scenes"):  # the same command once more
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
