"""Reading a run: whole lines only, missing parts empty, damage named."""

import math
from pathlib import Path

import pytest

from eval.examples import Examples, RetrievalExample, Retrieved
from eval.run_record import read_run
from tests.eval.runs import evaluated, logged, write_ledger, write_run
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.training.run_directory import RunDirectory


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


EXAMPLE = (
    '{"image": "0.jpg", "captions": ["c"], "rank": 1, "retrieved": [{"text": "t", "correct": true, "score": 0.5}]}'
)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", '{"step": 1}\n{broken}\n', "line 2 is damaged: no JSON object with a step"),
        ("metrics.jsonl", '{"step": 1}\n\n', "line 2 is damaged"),
        ("metrics.jsonl", "[1]\n", "line 1 is damaged"),
        ("metrics.jsonl", '{"stdp": 1}\n', "line 1 is damaged"),
        ("metrics.jsonl", '{"step": 1e3}\n', "line 1 is damaged"),
        ("metrics.jsonl", f'{{"step": 1{"0" * 400}}}\n', "line 1 is damaged"),
        ("metrics.jsonl", "[" * 100_000 + "\n", "line 1 is damaged"),
        ("metrics.jsonl", '{"step": 0, "samples": 0, "loss": 1}\n', "does not say after how many steps and samples"),
        ("metrics.jsonl", '{"step": 1, "samples": "x", "loss": 1}\n', "does not say after how many steps and samples"),
        ("metrics.jsonl", '{"step": 1, "steps_left_out": "x"}\n', "steps_left_out is no number"),
        ("metrics.jsonl", f'{{"step": 1, "eval/a/top1": 1{"0" * 400}}}\n', "eval/a/top1 is out of all bounds"),
        ("metrics.jsonl", '{"step": 1, "geometry/positive_scores": [1, "x"]}\n', "is no histogram in 2 bins"),
        ("metrics.jsonl", '{"step": 1, "geometry/a": [1, 2], "geometry/b": [1]}\n', "geometry/b is no histogram in 2"),
        ("ledger.jsonl", '{"step": 1, "source": "a"}\n', "line 1 is damaged: reason: this key is required"),
        ("ledger.jsonl", '{"step": 1, "source": "a", "reason": 3}\n', "line 1 is damaged: reason: found 3"),
        ("run.json", "[1]", "expected a JSON object, found list"),
        ("run.json", "{", "not readable as JSON"),
        ("run.json", '{"num_parameters": "many"}', "is damaged: num_parameters: found 'many'"),
        ("run.json", '{"metrics": {"a": [{"better": "lower"}]}}', "is damaged: metrics.a.0.name: this key is required"),
        ("run.json", '{"metrics": {"a": [{"name": "b/c"}]}}', "is damaged: metrics.a.0.name: found 'b/c'"),
        ("run.json", '{"metrics": {"a": [{"name": "b", "better": "more"}]}}', "metrics.a.0.better: found 'more'"),
        ("run.json", '{"versions": []}', "is damaged: versions: found"),
        ("run.json", '{"data": [{"name": "a"}]}', "is damaged: data.0.shards: this key is required"),
        ("run.json", '{"machine": {"memory_gib": "4"}}', "is damaged: machine.memory_gib: found '4'"),
        ("recipe.yaml", "a: [", "not readable as YAML"),
        ("recipe.yaml", "- 1", "expected a mapping of keys to values, found list"),
        ("recipe.yaml", "model: 3", "is damaged: model: found 3"),
        ("recipe.yaml", "objective: [clip]", "is damaged: objective: found"),
        ("recipe.yaml", "a: " + "[" * 5_000, "not readable as YAML"),
        ("examples/a/examples.json", "{}}", "not readable as JSON"),
        ("examples/a/examples.json", f'{{"best": {EXAMPLE}}}', "is damaged: best: found"),
        ("examples/a/examples.json", f'{{"good": [{EXAMPLE}]}}', "is damaged: good: unknown key"),
        (
            "examples/a/examples.json",
            f'{{"best": [{EXAMPLE.replace("0.5", "null")}]}}',
            "best.0.retrieved.0.score: found",
        ),
        ("examples/a/examples.json", f'{{"best": [{EXAMPLE.replace("1", "true")}]}}', "best.0.rank: found True"),
        ("examples/a/examples.json", '{"best": [{"image": "a.jpg", "captions": [], "generated": []}]}', "cider_d"),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, name: str, content: str, said: str) -> None:
    run = write_run(tmp_path / "run", [logged(10, 2.5)])
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_run(run)
    assert str(error.value).startswith(str(run / name))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "examples/a/examples.json"])
def test_no_bit_of_a_sealed_file_flips_unseen(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", [logged(10, 2.5)])
    directory = RunDirectory(run, World())
    directory.claim(resuming=True)
    directory.start({"seed": 1, "model": {"open_clip": "ViT"}}, {"threads": 3, "engine": "ddp"})
    Examples([RetrievalExample(b"x", ["a caption"], 1, [Retrieved("found", True, 0.5)])], []).write(run / "examples/a")
    path, read = run / name, read_run(run)
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), 9):  # each bit of a byte in turn, of every byte but one in nine
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_run(run)
        assert str(error.value).startswith(str(path))
    path.write_bytes(whole)
    assert read_run(run) == read
