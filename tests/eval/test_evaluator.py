"""Evaluators from a recipe: chosen by kind, checked before anything runs."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from eval.evaluator import EvaluatorConfig, build_evaluators
from eval.retrieval import Retrieval
from eval.zeroshot import ZeroShot
from tests.data.small_shards import WordTokenizer
from tests.eval.encoders import IMAGE, captioned_shard, labelled_shard
from vlm.errors import UserError

CONFIGS = TypeAdapter(dict[str, EvaluatorConfig])


def test_the_kind_chooses_the_evaluator(tmp_path: Path) -> None:
    captioned_shard(tmp_path, [["one"], ["two"]])
    labelled_shard(tmp_path, [0, 1])
    configs = CONFIGS.validate_python(
        {
            "finding": {"kind": "retrieval", "shards": "captioned.tar", "every": "2 epochs"},
            "naming": {"kind": "zeroshot", "shards": ["labelled.tar"], "classes": ["cat", "dog"]},
        }
    )
    built = build_evaluators(configs, IMAGE, WordTokenizer(), str(tmp_path))
    assert {name: type(evaluator) for name, evaluator in built.items()} == {"finding": Retrieval, "naming": ZeroShot}
    assert (str(configs["finding"].every), configs["naming"].every) == ("2 epochs", None)


def test_missing_shards_are_named_by_their_key(tmp_path: Path) -> None:
    configs = CONFIGS.validate_python({"val": {"kind": "retrieval", "shards": "no-*.tar"}})
    with pytest.raises(UserError, match=r"^evaluate\.val\.shards: no-\*\.tar matches no file"):
        build_evaluators(configs, IMAGE, WordTokenizer(), str(tmp_path))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="'zeroshot', 'retrieval'"):
        CONFIGS.validate_python({"val": {"kind": "retreival", "shards": "a.tar"}})
