"""Reading a run: whole lines only, missing parts empty, damage named."""

import math
import os
from pathlib import Path

import pytest

from eval.run_record import read_run
from tests.eval.runs import evaluated, logged, write_ledger, write_run
from vlm.errors import UserError


def test_metrics_evaluations_and_skips_are_told_apart(tmp_path: Path) -> None:
    lines = [
        logged(10, 2.5, siglip=0.5),
        evaluated(10, {"zs/top1": 0.5}),
        logged(20, 2.0),
        evaluated(20, {"zs/top1": 0.75}),
    ]
    run = read_run(write_run(tmp_path / "run", lines))
    assert run.curve("loss") == [(10, 2.5), (20, 2.0)]
    assert run.curve("siglip") == [(10, 0.5)]
    assert run.terms == ["clip", "siglip"]
    assert run.evaluations == {"zs/top1": [(10, 0.5), (20, 0.75)]}
    assert (run.last("loss"), run.last("nothing")) == (2.0, None)
    write_ledger(run.path, ["it is cut (at byte 3)", "it is cut (at byte 9)", "its cls is no number: b'x'"])
    assert read_run(run.path).skips == {("photos", "it is cut"): 2, ("photos", "its cls is no number"): 1}


@pytest.mark.parametrize("torn", ["", '{"step": 30, "lo', '{"step": 30, "loss": 1.0}'])
def test_a_line_that_is_being_written_is_left_out(tmp_path: Path, torn: str) -> None:
    run = read_run(write_run(tmp_path / "run", [logged(10, 2.5), logged(20, 2.0)], torn=torn))
    assert [step for step, _ in run.curve("loss")] == [10, 20]


def test_what_a_run_has_not_written_is_empty(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    run = read_run(tmp_path)
    assert (run.recipe, run.facts, run.training, run.evaluations, run.skips, run.examples) == (
        {"seed": 1},
        {},
        [],
        {},
        {},
        {},
    )


def test_what_is_no_number_survives(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [logged(10, math.nan)]))
    assert math.isnan(run.curve("loss")[0][1])


def test_what_is_no_run_or_is_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing: there is no such run directory$"):
        read_run(tmp_path / "missing")
    with pytest.raises(UserError, match=r": not a run directory: it holds neither recipe\.yaml nor metrics\.jsonl$"):
        read_run(tmp_path)
    run = write_run(tmp_path / "run", [logged(10, 2.5)])
    (run / "run.json").write_text("[1]")
    with pytest.raises(UserError, match=r"run\.json: expected a JSON object, found list$"):
        read_run(run)
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: not readable as JSON"):
        read_run(run)
    (run / "metrics.jsonl").write_text("{}\n{broken}\n{}\n")
    (run / "run.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is no JSON object$"):
        read_run(run)
    (run / "metrics.jsonl").write_text("")
    (run / "recipe.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"recipe\.yaml: not readable as YAML") as error:
        read_run(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "metrics.jsonl", "run.json", "ledger.jsonl", "examples/a/examples.json"]
)
def test_a_run_from_elsewhere_shows_no_file_but_its_own(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", [logged(10, 2.5)])
    (run / "examples" / "a").mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=rf"^report: .*{name} is a link that leads out of"):
        read_run(run)
    (run / name).unlink()
    os.mkfifo(run / name)  # reading it would never end
    if name != "recipe.yaml":
        with pytest.raises(UserError, match=rf"^report: .*{name} is a FIFO, not a file"):
            read_run(run)
