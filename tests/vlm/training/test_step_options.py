"""How a step is computed, as a recipe says it or leaves it open: precision of pairs, attention, texts in groups."""

from typing import Any

import pytest
import torch

from tests.vlm.model.tiny import tiny_model
from vlm.distributed.world import World
from vlm.model.attention import Attention
from vlm.training.assembly import assemble, build_objective
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.start import start_accelerator


@pytest.mark.parametrize(
    ("keys", "product"),
    [
        ({}, "fp32"),
        ({"precision": "bf16"}, "bf16"),
        ({"precision": "bf16", "objective": {"sigmoid": 1, "uniformity": 0.1}}, "bf16"),
        ({"precision": "bf16", "objective": {"clip": 1, "hard": 1}}, "fp32"),  # rounding would pick other negatives
        ({"precision": "bf16", "similarity": {"product": "fp32"}}, "fp32"),
        ({"similarity": {"product": "bf16"}, "objective": {"hard": 1}}, "bf16"),
    ],
)
def test_products_are_in_bf16_where_the_towers_are_and_nothing_is_picked(keys: dict[str, Any], product: str) -> None:
    assert TrainingConfig.model_validate(keys).comparison.product == product


def test_the_options_reach_model_and_objective() -> None:
    model = tiny_model()
    settings = EngineSettings("ddp", 4, "bf16")
    keys = {"global_batch": 4, "precision": "bf16", "attention": "explicit", "group_texts": False}
    config = TrainingConfig.model_validate(keys)
    objective = build_objective(config, model, 4, World())
    assert objective.exchange.matmul_dtype == torch.bfloat16
    assemble(config, settings, start_accelerator(settings), model, objective)
    for tower in (model.image, model.text):
        assert {module.choice for module in tower.modules() if isinstance(module, Attention)} == {"explicit"}
    assert not model.text.groups_texts
