"""Counting and composition in the training loop: measured on the way, resumed, in the report, and by `vlm eval`."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.main import app
from tests.data.small_shards import picture, with_json, write_shard
from tests.launch.small import metrics_of
from tests.launch.tiny import assert_refused, assert_same_run, stopped_at, train_here, write_tiny, write_tiny_recipe
from vlm.errors import UserError

WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def write_questions(folder: Path) -> dict[str, Any]:
    """Counted shards and a benchmark's file with its images; the evaluations of a recipe that ask both."""
    samples = [with_json(n, captions=[f"{word} cats"]) for n, word in enumerate(WORDS)]
    write_shard(folder / "counted.tar", samples)
    entries = [
        {"filename": f"{n}.jpg", "caption": f"{word} cats", "negative_caption": f"cats of {word} and more"}
        for n, word in enumerate(WORDS)
    ]
    (folder / "crepe.json").write_text(json.dumps({"add": entries[:5], "swap": entries[5:]}))
    (folder / "images").mkdir()
    for number in range(len(WORDS) - 1):
        (folder / "images" / f"{number}.jpg").write_bytes(picture(number))
    return {
        "count": {"kind": "counting", "shards": "counted.tar", "every": "6 steps"},
        "compare": {"kind": "compositional", "file": "crepe.json", "images": "images"},
    }


@pytest.mark.slow
def test_a_run_asks_on_the_way_and_its_report_shows_the_answers(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    run, data = tmp_path / "run", {"max_bad_share": 0.5}
    changes = {"evaluate": write_questions(tmp_path), "data": data, "trackers": ["tensorboard"]}
    train_here(write_tiny_recipe(tmp_path, run, **changes))
    lines = [line for line in metrics_of(run) if "eval/count/accuracy" in line]
    assert [line["step"] for line in lines] == [6, 12]
    confusion = lines[-1]["eval/count/confusion"]
    assert confusion["columns"] == WORDS
    assert [sum(row) for row in confusion["rows"].values()] == [1] * 9
    right = sum(confusion["rows"][word][place] for place, word in enumerate(WORDS))
    assert lines[-1]["eval/count/accuracy"] == pytest.approx(right / 9)
    page = (run / "report.html").read_text()
    for words in ("count: answers by right number", "compare: kinds", "rows: the right number; columns: the answer"):
        assert words in page
    assert 'class="shaded" style="--share: 100.0%">1<' in page
    listing = json.loads((run / "examples" / "count" / "examples.json").read_text())
    assert all(one["captions"][0] in page for one in listing["best"] + listing["worst"])

    resumed = stopped_at(run, 6, tmp_path / "resumed")
    train_here(write_tiny_recipe(tmp_path, resumed, **changes), resume="auto")
    assert_same_run(resumed, run)

    compared = next(line for line in metrics_of(run) if "eval/compare/accuracy" in line)
    file, plots = tmp_path / "figures.json", tmp_path / "plots"
    command = ["eval", "compositional", str(run), "--file", str(tmp_path / "crepe.json"), "--json", str(file)]
    result = CliRunner().invoke(app, [*command, "--images", str(tmp_path / "images")])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    figures = {key.rpartition("/")[2]: value for key, value in compared.items() if key.startswith("eval/compare/")}
    assert found["kinds"] == figures.pop("kinds")
    assert {key: found[key] for key in figures} == pytest.approx(figures)
    assert (found["num_samples"], found["num_missing"]) == (8, 1)
    assert "1 of 9 entries have no image in" in result.output
    command = ["eval", "counting", str(run), "--data", str(tmp_path / "counted.tar"), "--plots", str(plots)]
    result = CliRunner().invoke(app, [*command, "numbers=[2,10]"])
    assert result.exit_code == 0, result.output
    assert "rows: the right number" in result.output
    assert [path.name for path in plots.iterdir()] == ["confusion.png"]


@pytest.mark.parametrize(
    ("evaluate", "line"),
    [
        ({"file": "crepe.json", "images": "images"}, r"^evaluate\.it\.file: .*crepe\.json: an object of lists"),
        (
            {"file": "crepe.json"},
            r"evaluate\.it: shards: name shards \(--data\), or a file and the folder of its images",
        ),
        ({"images": "images"}, r"evaluate\.it: images: a folder of images needs a file"),
        ({"file": "a", "images": "b", "shards": "c"}, r"evaluate\.it: images: the images lie in a folder"),
        ({"file": "crepe.jsn", "images": "images"}, r"^evaluate\.it\.file: 'crepe.jsn': there is no such file"),
        ({"file": [], "images": "images"}, r"evaluate\.it\.file: found \[\]; input"),
        ({"shards": "counted.tar", "numbers": [2, 11]}, r"evaluate\.it\.numbers\.1: found 11; input should be less"),
        ({"shards": "counted.tar", "numbers": [2, 3, 2]}, r"numbers: one of them stands there twice"),
    ],
)
def test_a_wrong_evaluation_is_refused_before_a_model_is_built(
    tmp_path: Path, evaluate: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path)
    write_questions(tmp_path)
    monkeypatch.setattr("launch.train.ranks_together", None)  # nothing of a run begins
    recipe = write_tiny_recipe(tmp_path, tmp_path / "run", evaluate={"it": {"kind": "counting", **evaluate}})
    assert_refused(recipe, tmp_path / "run", line)


def test_the_command_refuses_a_file_before_it_looks_for_the_model(tmp_path: Path) -> None:
    write_questions(tmp_path)
    file, images = str(tmp_path / "crepe.json"), str(tmp_path / "images")
    result = CliRunner().invoke(app, ["eval", "counting", "no-such-run", "--file", file, "--images", images])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(f"--file: {file}: an object of lists")
