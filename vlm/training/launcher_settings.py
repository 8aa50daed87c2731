"""What a launcher, or its configuration file, says of precision, accumulation or engine: the recipe decides."""

import os
from collections.abc import MutableMapping

from vlm.training.engines.base import EngineName, Precision

# What accelerate reads where its caller says nothing, and what DeepSpeed's and other plugins of it read.
_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# These say where and how loudly a run is computed, not what is computed.
_KEPT = {
    "ACCELERATE_USE_CPU",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_DISABLE_RICH",
}
# Words with which a launcher says that it wants nothing of its own.
_NOTHING = {"", "0", "1", "no", "none", "false", "auto", "default"}
_OTHERS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_DOWNCAST_BF16",
}


def overrule_launcher(
    engine: EngineName, precision: Precision, environ: MutableMapping[str, str] | None = None
) -> list[str]:
    """Take a launcher's own settings out of the environment; a line on those that would have changed the run."""
    environ = os.environ if environ is None else environ
    found = {name: value for name, value in environ.items() if name.startswith(_PREFIXES) and name not in _KEPT}
    for name in found:
        del environ[name]
    differing = [_told(name, value) for name, value in found.items() if _differs(name, value, engine, precision)]
    if not differing:
        return []
    return [
        f"the launcher says {', '.join(sorted(differing))}; the recipe decides: "
        f"engine {engine}, precision {precision}, no other accumulation"
    ]


def _differs(name: str, value: str, engine: EngineName, precision: Precision) -> bool:
    word = value.strip().lower()
    if name == "ACCELERATE_MIXED_PRECISION":
        return word not in ("", "no", precision)
    if name == "ACCELERATE_USE_DEEPSPEED":
        return word == "true" and engine == "ddp"
    if name == "ACCELERATE_DEEPSPEED_ZERO_STAGE":
        return engine != "ddp" and word != engine.removeprefix("zero")
    return name in _OTHERS and word not in _NOTHING


def _told(name: str, value: str) -> str:
    return f"{name.removeprefix('ACCELERATE_').lower()} {value!r:.60}"
