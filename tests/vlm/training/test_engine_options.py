"""Options of engines: what a run tells its libraries is what is shown of it; what an engine lacks is refused."""

import json
from typing import Any

import pytest

from vlm.errors import UserError
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.options import EngineOptions
from vlm.training.engines.start import configuration


def settings_of(engine: str, **options: Any) -> EngineSettings:
    return EngineSettings(engine, 8, "bf16", 0.5, EngineOptions.model_validate(options))


def test_the_configuration_of_a_run_is_plain_and_says_what_was_asked_for() -> None:
    shown = configuration(settings_of("zero2", wire="bf16", bucket_mib=1, overlap=False), cuda=True)
    assert json.loads(json.dumps(shown)) == shown
    deepspeed = shown["deepspeed"]
    assert deepspeed["train_micro_batch_size_per_gpu"] == 8
    assert deepspeed["gradient_accumulation_steps"] == shown["accelerate"]["gradient_accumulation_steps"] == 1
    assert deepspeed["gradient_clipping"] == shown["engine"]["max_grad_norm"] == 0.5
    assert deepspeed["torch_autocast"]["enabled"]
    assert deepspeed["communication_data_type"] == "bf16"
    assert deepspeed["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 2**18}
    ddp = configuration(settings_of("ddp", wire="bf16"), cuda=False)
    assert ddp["distributed_data_parallel"]["comm_hook"] == "bf16"
    assert ddp["accelerate"]["cpu"]


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        (
            "ddp",
            {"overlap": True},
            r"engine_options.overlap: found True, which engine ddp .* engine: zero1, zero2, zero3$",
        ),
    ],
)
def test_what_an_engine_does_not_have_is_one_line(engine: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        configuration(settings_of(engine, **options), cuda=False)
