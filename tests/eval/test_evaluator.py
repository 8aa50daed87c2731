"""Evaluators from a recipe: chosen by kind, checked before anything runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from eval.evaluator import EvaluationContext
from eval.recipe import Evaluations, build_evaluators
from eval.retrieval import Retrieval
from eval.shards import Patterns, ShardEvaluationConfig
from eval.zeroshot import ZeroShot
from tests.eval.encoders import CONTEXT, captioned_shard, labelled_shard
from vlm.config import Config, first_problem
from vlm.errors import UserError

CONFIGS = TypeAdapter(Evaluations)


class Holder(Config):
    evaluate: Evaluations


def test_the_kind_chooses_the_evaluator(tmp_path: Path) -> None:
    captioned_shard(tmp_path, [["one"], ["two"]])
    labelled_shard(tmp_path, [0, 1])
    configs = CONFIGS.validate_python(
        {
            "finding": {"kind": "retrieval", "shards": "captioned.tar", "every": "2 epochs"},
            "naming": {"kind": "zeroshot", "shards": ["labelled.tar"], "classes": ["cat", "dog"]},
        }
    )
    built = build_evaluators(configs, replace(CONTEXT, root=str(tmp_path)))
    assert {name: type(evaluator) for name, evaluator in built.items()} == {"finding": Retrieval, "naming": ZeroShot}
    assert (str(configs["finding"].every), configs["naming"].every) == ("2 epochs", None)


def test_missing_shards_are_named_by_their_key(tmp_path: Path) -> None:
    configs = CONFIGS.validate_python({"val": {"kind": "retrieval", "shards": "no-*.tar"}})
    with pytest.raises(UserError, match=r"^evaluate\.val\.shards: no-\*\.tar matches no file"):
        build_evaluators(configs, replace(CONTEXT, root=str(tmp_path)))


class TwoSetsConfig(ShardEvaluationConfig):
    others: Patterns

    def build(self, context: EvaluationContext) -> Any:
        return [self.held_out(context, key) for key in ("shards", "others")]


def test_an_evaluator_may_have_several_sets_each_blamed_by_its_key(tmp_path: Path) -> None:
    shard = captioned_shard(tmp_path, [["one"], ["two"]])
    config = TwoSetsConfig(kind="two", shards=shard, others=(labelled_shard(tmp_path, [0, 1, 2]), shard), limit=4)
    assert [len(held_out) for held_out in config.build(CONTEXT)] == [2, 4]
    config = config.model_copy(update={"others": "no-*.tar"})
    with pytest.raises(UserError, match=r"^evaluate\.val\.others: no-\*\.tar matches no file"):
        build_evaluators({"val": config}, CONTEXT)
    with pytest.raises(UserError, match=r"^--others: no-\*\.tar matches no file"):
        config.build(replace(CONTEXT, options={"others": "--others"}))


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (
            {"kind": "retreival", "shards": "a.tar"},
            "val.kind: there is no evaluator 'retreival'; nearest: retrieval, or name your own as package.module:Class",
        ),
        ({"shards": "a.tar"}, "val.kind: this key is required"),
        ({"kind": ["retrieval"]}, "val.kind: found ['retrieval']; input should be a valid string"),
        ({"kind": "retrieval", "shards": "a.tar", "tlie": 3}, "val.tlie: unknown key (value 3); nearest: tile"),
        ({"kind": "retrieval", "shards": "a.tar", "tile": 0}, "val.tile: found 0; input should be greater than 0"),
        ({"kind": "zeroshot", "shards": "a.tar", "classes": "c", "shifts": [1, "x"]}, "val.shifts.1: found 'x'; "),
        ({"kind": "retrieval"}, "val.shards: this key is required"),
        ({"kind": "os:path", "shards": "a.tar"}, "val.kind: evaluator 'os:path' is not a subclass of eval.evaluator."),
        (
            {"kind": "no_such_module:A{b}"},
            "val.kind: evaluator 'no_such_module:A{b}': No module named 'no_such_module'",
        ),
        ("retrieval", "val: found 'retrieval'; input should be a valid dictionary"),
    ],
)
def test_a_mistake_is_a_line_with_its_path_and_the_nearest(value: Any, line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"evaluate": {"val": value}})
    problem = first_problem(caught.value, Holder)
    assert problem.startswith(f"evaluate.{line}")
    assert "\n" not in problem
