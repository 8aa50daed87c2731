"""The recipe alone decides: what a launcher says of precision, accumulation and engine changes no number."""

from pathlib import Path

import pytest
import torch

from tests.launch.small import metrics_of
from tests.launch.tiny import train_here, write_tiny, write_tiny_recipe
from vlm.training.launcher_settings import overrule_launcher


@pytest.mark.parametrize(
    ("environ", "engine", "precision", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ddp", "fp32", ["mixed_precision 'bf16'", "precision fp32"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "ddp", "bf16", ["mixed_precision 'fp16'", "precision bf16"]),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ddp", "fp32", ["gradient_accumulation_steps '4'"]),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ddp", "fp32", ["use_deepspeed 'true'", "engine ddp"]),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero2", "fp32", ["deepspeed_zero_stage '3'", "engine zero2"]),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "ddp", "fp32", ["use_fsdp"]),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp", "fp32", []),
        ({"FSDP_VERSION": "1", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp", "fp32", ["fsdp_version '1'", "engine fsdp"]),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "fsdp", "fp32", ["use_deepspeed 'true'"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ddp", "fp32", ["dynamo_backend"]),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, "ddp", "bf16", []),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ddp", "bf16", []),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2", "fp32", []),
        ({"ACCELERATE_USE_CPU": "True"}, "ddp", "fp32", []),
    ],
)
def test_what_differs_is_told_in_one_line(
    environ: dict[str, str], engine: str, precision: str, words: list[str]
) -> None:
    lines = overrule_launcher(engine, precision, environ)  # type: ignore[arg-type]
    assert len(lines) == bool(words)
    assert all(word in lines[0] for word in words)
    assert set(environ) <= {"ACCELERATE_USE_CPU"}


def test_a_run_under_a_launcher_with_settings_is_the_run_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path)
    runs = []
    for name, settings in {
        "plain": {},
        "set": {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "4", "DYNAMO_BACKEND": "INDUCTOR"},
    }.items():
        for key, value in settings.items():
            monkeypatch.setenv(f"ACCELERATE_{key}", value)
        train_here(write_tiny_recipe(tmp_path, tmp_path / name, duration="3 steps"))
        runs.append(metrics_of(tmp_path / name))
    assert runs[0] == runs[1]
    assert not torch.is_autocast_enabled("cpu")
