"""Data sections of recipes, those that are accepted and those that are refused."""

import pytest
from pydantic import ValidationError

from data.config import DataConfig


def test_one_pattern_or_several() -> None:
    config = DataConfig.model_validate(
        {"sources": {"a": {"shards": "x.tar"}, "b": {"shards": ["y.tar", "z.tar"], "weight": 2}}}
    )
    assert config.sources["a"].patterns == ("x.tar",)
    assert config.sources["b"].patterns == ("y.tar", "z.tar")
    assert config.sources["b"].weight == 2.0


@pytest.mark.parametrize(
    ("wrong", "blamed"),
    [
        ({"sources": {}}, "sources"),
        ({"sources": {"a": {"shards": "x.tar", "weight": 0}}}, "weight"),
        ({"sources": {"a": {"shards": "x.tar"}}, "augment": {"crop_scale": [0.5, 1.5]}}, "crop_scale"),
        ({"sources": {"a": {"shards": "x.tar"}}, "augment": {"crop_scale": [0.9, 0.5]}}, "crop_scale"),
        ({"sources": {"a": {"shards": "x.tar"}}, "caption": "last"}, "caption"),
        ({"sources": {"a": {"shards": "x.tar"}}, "workers": -1}, "workers"),
        ({"sources": {"a": {"shard": "x.tar"}}}, "shard"),
        ({"sources": {"a": {"shards": "x.tar", "weight": 2}}, "mix": "once"}, "sources.a.weight"),
        ({"sources": {"a": {"shards": "x.tar"}}, "max_bad_share": 2}, "max_bad_share"),
    ],
)
def test_an_impossible_value_is_refused_by_name(wrong: dict[str, object], blamed: str) -> None:
    with pytest.raises(ValidationError, match=blamed):
        DataConfig.model_validate(wrong)
