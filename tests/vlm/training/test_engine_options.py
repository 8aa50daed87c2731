"""Options of engines: what a run tells its libraries is what is shown of it; what an engine lacks is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from tests.launch.tiny import assert_refused, write_tiny, write_tiny_recipe
from vlm.errors import UserError
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.ddp import DdpEngine
from vlm.training.engines.fsdp import fsdp_plugin
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


class Bare(DdpEngine):
    """An engine that follows no option."""

    takes = frozenset()


BARE = f"{__name__}:Bare"


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        ("ddp", {"overlap": True}, "overlap: found True, which engine ddp .* engine: zero1, zero2, zero3$"),
        ("ddp", {"offload": {"optimizer": "cpu"}}, "offload.optimizer: found 'cpu', which .* zero1, zero2, zero3$"),
        ("zero2", {"offload": {"parameters": "cpu"}}, "offload.parameters: found 'cpu', .* engine: fsdp, zero3$"),
        ("zero3", {"shard_group": "node"}, "shard_group: found 'node', which engine zero3 .* engine: fsdp$"),
        ("zero1", {"prefetch": 2}, "prefetch: found 2, which engine zero1 .* engine: fsdp$"),
        ("fsdp", {"bucket_mib": 1}, "bucket_mib: found 1, which engine fsdp .* engine: ddp, zero1, zero2, zero3$"),
        (BARE, {"wire": "bf16"}, "wire: found 'bf16', which .*Bare does not have; .* ddp, fsdp, zero1, zero2, zero3$"),
    ],
)
def test_what_an_engine_does_not_have_is_one_line(engine: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"^engine_options\.{words}"):
        configuration(settings_of(engine, **options), cuda=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_checkpointing": ["vision"]}, r"found 'vision'; input should be 'image', 'text' or 'captioner'"),
        ({"activation_checkpointing": ["captioner"]}, r"found captioner, and .*; choose from: image, text"),
        ({"engine_options": {"offload": {"optimizer": "nvme"}}}, r"offload.optimizer: found 'nvme', .*; choose cpu"),
        (
            {"engine_options": {"shard_group": 1}},
            r"engine_options.shard_group: found 1; choose from: all, node, or 2 ranks",
        ),
        (
            {"engine": "fsdp", "engine_options": {"overlap": True}},
            r"engine_options.overlap: found True, which engine",
        ),
    ],
)
def test_a_wrong_use_ends_a_run_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_tiny(tmp_path)
    assert_refused(write_tiny_recipe(tmp_path, tmp_path / "run", **changes), tmp_path / "run", words)


def test_accelerate_takes_its_own_fsdp2_as_it_is_told() -> None:
    plugin = fsdp_plugin(settings_of("fsdp", wire="bf16", offload={"parameters": "cpu"}))
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    assert plugin.mixed_precision_policy.reduce_dtype == torch.bfloat16
    assert plugin.auto_wrap_policy is None
