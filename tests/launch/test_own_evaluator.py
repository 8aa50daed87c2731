"""An evaluator from outside this project: in a recipe, in the report with the meaning of its metrics, in `vlm eval`."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from data.loading.heldout import HeldOutSet
from eval.evaluator import EVALUATORS
from eval.report import write_report
from launch.main import app
from launch.model_source import load_model
from tests.launch.small import metrics_of
from tests.launch.tiny import train_here, write_tiny, write_tiny_recipe
from vlm.distributed.world import World

MODULE = '''
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from eval.encoder import embed_images, evaluation_mode
from eval.shards import ShardEvaluationConfig
from vlm.evaluation import Evaluation, Evaluator, Metric


class SpreadConfig(ShardEvaluationConfig):
    """How far images are from their mean."""

    power: int = Field(default=2, ge=1, le=9, description="of the distance")
    example: str | None = Field(default="an example", description="null: it cannot be written")
    plots: ClassVar[tuple[str, ...]] = ("spread.txt",)

    def build(self, context):
        return Spread(self, context)


class ListConfig(SpreadConfig):
    """A configuration whose evaluator measures nothing."""

    def build(self, context):
        return []


class Text:
    def __init__(self, name, text):
        self.name, self.text = name, text

    def write(self, folder):
        if self.text is None:
            raise OSError("no space left")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.name).write_text(self.text)
        return [folder / self.name]


class Spread(Evaluator):
    metrics = (
        Metric("accuracy_spread", "lower", "mean distance of an image from the mean image", label="spread"),
        Metric("num_images", unit="count", label="images"),
    )

    def __init__(self, config, context):
        self.config = config
        self.held_out = config.held_out(context)

    @property
    def records(self):
        return {"shards": self.held_out.record}

    def run(self, model, world):
        config = self.config
        with evaluation_mode(model, config.embedding, config.precision) as encoder:
            rows = embed_images(encoder, self.held_out, world, config.batch_size, config.workers).rows
        distances = (rows - rows.mean(0)).norm(dim=1) ** config.power
        return Evaluation(
            {"accuracy_spread": float(distances.mean()), "num_images": len(rows)},
            curves={"distances": {"all": distances.tolist()}},
            examples=Text("note.txt", config.example),
            plots=Text("spread.txt", "a plot"),
        )
'''
KIND, LIST = "my_evaluators:SpreadConfig", "my_evaluators:ListConfig"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of other seeds, that were evaluated by a class in a module beside them."""
    folder = tmp_path_factory.mktemp("own")
    write_tiny(folder)
    (folder / "my_evaluators.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.path", list(sys.path))
        mine = {"kind": KIND, "shards": "train-0*.tar", "every": "2 steps", "power": 3}
        alarm = [{"metric": "eval/mine/accuracy_spread", "rises_by": 1e6, "over": "9 steps"}]
        failing = {"kind": KIND, "shards": "train-0*.tar", "example": None}
        for seed in (0, 1):
            evaluations = {"mine": mine, "failing": failing}
            changes: dict[str, Any] = {"seed": seed, "duration": "4 steps", "evaluate": evaluations, "alarm": alarm}
            train_here(write_tiny_recipe(folder, folder / f"run-{seed}", **changes))
    return folder


def spread(run: Path, power: int) -> float:
    """The mean over images, one at a time, of the distance from the mean image."""
    model = load_model(str(run))
    batches = HeldOutSet(str(run.parent / "train-0*.tar"), model.image_spec).batches(World(), 1)
    with torch.no_grad():
        rows = [model.encode_image(batch.images)[0].double() for batch in batches if batch.valid.all()]
    mean = sum(rows, torch.zeros(())) / len(rows)
    return float(sum(float((row - mean).square().sum()) ** (power / 2) for row in rows)) / len(rows)


def vlm(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> Result:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", list(sys.path))
    return CliRunner().invoke(app, ["eval", *words])


def test_a_run_measures_with_it_and_its_report_knows_what_is_better(folder: Path) -> None:
    runs = [folder / "run-0", folder / "run-1"]
    values = []
    for run in runs:
        measured = {line["step"]: line for line in metrics_of(run) if "eval/mine/accuracy_spread" in line}
        assert sorted(measured) == [2, 4]
        assert measured[4]["eval/mine/num_images"] == 47
        values.append(measured[4]["eval/mine/accuracy_spread"])
        assert values[-1] == pytest.approx(spread(run, 3), rel=1e-4)
        assert (run / "examples" / "mine" / "note.txt").read_text() == "an example"
        assert not (run / "examples" / "mine" / "spread.txt").exists()
        # Examples that could not be written cost the run nothing else.
        assert [folder.name for folder in (run / "examples").iterdir()] == ["mine"]
        assert [line["step"] for line in metrics_of(run) if "eval/failing/accuracy_spread" in line] == [4]
        assert (run / "checkpoints" / "step-00000004").is_dir()
    write_report(runs, folder / "both.html")
    page = (folder / "both.html").read_text()
    best = re.findall(r'<td class="best">([^<]*)', page)
    assert best[0] == f"{min(values):.4g}" != f"{max(values):.4g}"
    assert len(best) == 2  # the other evaluation has one too
    assert 'title="mean distance of an image from the mean image">spread ↓</th>' in page
    assert "<h3>mine: spread ↓</h3>" in page
    assert "<h3>failing: spread ↓</h3>" not in page  # a single point
    write_report(runs[:1], folder / "one.html")
    assert "47 images; ↓: lower is better" in (folder / "one.html").read_text()
    ours = {"zeroshot", "generative_zeroshot", "retrieval", "geometry", "caption", "counting", "compositional"}
    assert EVALUATORS.all().keys() == ours


def test_the_command_runs_it_with_any_of_its_keys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (KIND, "run-0", "--data", "train-0*.tar", "--json", "spread.json", "--plots", "plots")
    result = vlm(monkeypatch, folder, *command, "power=1", "batch_size=7")
    assert result.exit_code == 0, result.output
    assert "spread.txt" in result.output
    assert (folder / "plots" / "spread.txt").read_text() == "a plot"
    found = json.loads((folder / "spread.json").read_text())
    assert (found["evaluation"], found["precision"], found["num_images"]) == (KIND, "fp32", 47)
    assert found["accuracy_spread"] == pytest.approx(spread(folder / "run-0", 1), rel=1e-5)
    assert found["accuracy_spread"] == pytest.approx(sum(found["distances"]["all"]) / 47)


def test_the_kinds_that_ship_take_any_of_their_keys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("retrieval", "run-0", "--data", "train-0*.tar", "--json", "found.json")
    found = []
    for words in ((), ("tile=3", "batch_size=5"), ("limit=9", "--batch-size", "4"), ("--limit", "9")):
        result = vlm(monkeypatch, folder, *command, *words)
        assert result.exit_code == 0, result.output
        found.append(json.loads((folder / "found.json").read_text()))
    assert found[0] == found[1]
    assert found[2] == found[3] != found[0]
    assert (found[0]["num_images"], found[2]["num_images"]) == (47, 9)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((KIND, "run-0"), "shards: this key is required"),
        ((KIND, "run-0", "--data", "a.tar", "powr=1"), "powr: unknown key (value 1); nearest: power"),
        ((KIND, "run-0", "--data", "a.tar", "power=0"), "power: found 0; input should be greater than or equal to 1"),
        ((KIND, "run-0", "--data", "a.tar", "power"), "override 'power': write key.path=value"),
        ((KIND, "run-0", "--data", "no-*.tar"), "--data: no-*.tar matches no file"),
        ((LIST, "run-0", "--data", "a.tar"), f"kind: {LIST} builds a list, which is no evaluator: derive it from"),
        (("retrieval", "run-0", "--data", "a.tar", "tlie=1"), "tlie: unknown key (value 1); nearest: tile"),
        (("retrieval", "run-0", "--data", "a.tar", "kind=zeroshot"), "kind: found 'zeroshot'; the kind is the word"),
        (("my_evaluators:Nothing", "run-0"), "kind: evaluator 'my_evaluators:Nothing': module"),
        (("my_evaluators:Text", "run-0"), "kind: evaluator 'my_evaluators:Text' is not a subclass of eval.evaluator"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], line: str
) -> None:
    result = vlm(monkeypatch, folder, *words)
    assert str(result.exception).startswith(line), result.exception
    assert "\n" not in str(result.exception)
