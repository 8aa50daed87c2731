"""The settings of a launcher on precision, accumulation or engine, overruled: the recipe decides."""

import os
from collections.abc import MutableMapping

from vlm.training.precision import Precision

# What accelerate reads where its caller says nothing, and what DeepSpeed's and other plugins of it read.
_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# These say where and how loudly a run is computed, not what is computed.
_ALLOWED = {
    "ACCELERATE_USE_CPU",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_DISABLE_RICH",
}
# Words with which a launcher says that it wants nothing of its own.
_NOTHING = {"", "0", "0.0", "1", "no", "none", "false", "auto", "default"}
_CLIPPING = "ACCELERATE_GRADIENT_CLIPPING"
_OTHERS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    _CLIPPING,
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_DOWNCAST_BF16",
}

# Flags of engines, and how the names of the engines begin that they are for.
_ENGINE_FLAGS = {"ACCELERATE_USE_DEEPSPEED": "zero", "ACCELERATE_USE_FSDP": "fsdp"}
# What engine fsdp does, whatever accelerate's options say.
_FSDP = {
    "FSDP_VERSION": "2",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


def overrule_launcher(
    engine: str,
    precision: Precision,
    environ: MutableMapping[str, str] | None = None,
    *,
    max_grad_norm: float | None = None,
) -> list[str]:
    """Take a launcher's own settings out of the environment; a line on those that would have changed the run."""
    environ = os.environ if environ is None else environ
    settings = {name: value for name, value in environ.items() if name.startswith(_PREFIXES) and name not in _ALLOWED}
    for name in settings:
        del environ[name]
    differing = [
        _setting_words(name, value)
        for name, value in settings.items()
        if _differs(name, value, engine, precision) and not (name == _CLIPPING and _number(value) == max_grad_norm)
    ]
    if not differing:
        return []
    return [
        f"the launcher says {', '.join(sorted(differing))}; the recipe decides: "
        f"engine {engine}, precision {precision}, no other accumulation"
    ]


def _differs(name: str, value: str, engine: str, precision: Precision) -> bool:
    word = value.strip().lower()
    if name == "ACCELERATE_MIXED_PRECISION":
        return word not in ("", "no", precision)
    if name in _ENGINE_FLAGS:
        return word == "true" and not engine.startswith(_ENGINE_FLAGS[name])
    if name == "ACCELERATE_DEEPSPEED_ZERO_STAGE":
        return engine.startswith("zero") and word != engine.removeprefix("zero")
    if name in _FSDP:
        return engine == "fsdp" and word != _FSDP[name]
    return name in _OTHERS and word not in _NOTHING


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _setting_words(name: str, value: str) -> str:
    return f"{name.removeprefix('ACCELERATE_').lower()} {value!r:.60}"
