"""What accelerate and DeepSpeed would be told to run a recipe: printed for reading, and for `accelerate launch`."""

import json
from typing import Any

import yaml

from launch.parts import engine_settings
from launch.recipe import Recipe
from vlm.training.engines.start import configuration
from vlm.training.micro_batches import MicroBatchPlan

_HEAD = """\
# What the recipe amounts to on {nodes} nodes of {ranks} ranks. It decides: a file that says otherwise is overruled.
# {global_batch} pairs a step, {rows} on the fullest rank, in {count} micro-batch(es): they go through the towers within
# one step of accelerate and DeepSpeed, for which nothing is accumulated.
"""


def config_text(recipe: Recipe, nodes: int, ranks: int) -> str:
    """YAML of several documents: accelerate's configuration file, then what the engine is told.

    Raises UserError where the recipe does not fit so many ranks.
    """
    told = told_config(recipe, nodes, ranks)
    plan = MicroBatchPlan(recipe.global_batch, nodes * ranks, recipe.micro_batch)
    rows = told["engine"]["rows_per_rank"]
    head = _HEAD.format(nodes=nodes, ranks=ranks, global_batch=recipe.global_batch, rows=rows, count=plan.count)
    parts = [("accelerate launch --config_file", accelerate_config(recipe, nodes, ranks)), *told.items()]
    return head + "".join(f"---\n# {name}\n{_yaml(values)}" for name, values in parts if name != "accelerate")


def told_config(recipe: Recipe, nodes: int, ranks: int) -> dict[str, Any]:
    """What the engine itself is started and built from on so many ranks."""
    if recipe.precision == "auto":
        recipe = recipe.model_copy(update={"precision": "bf16"})
    settings = engine_settings(recipe, recipe.max_grad_norm, nodes * ranks)
    return configuration(settings, cuda=True)


def accelerate_config(recipe: Recipe, nodes: int, ranks: int) -> dict[str, Any]:
    """A configuration file of `accelerate launch` that starts these ranks and contradicts nothing of the recipe."""
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _type_of(recipe.engine, nodes * ranks),
        "num_machines": nodes,
        "num_processes": nodes * ranks,
        "mixed_precision": "no" if recipe.precision == "fp32" else "bf16",  # auto: on the GPUs of those nodes
        "use_cpu": False,
    }
    if nodes > 1:
        config |= {"machine_rank": 0, "main_process_ip": "FIRST_NODE", "main_process_port": 29_500}
        config |= {"rdzv_backend": "static", "same_network": True}
    told = told_config(recipe, nodes, ranks)
    if "deepspeed" in told:
        config["deepspeed_config"] = {
            "deepspeed_multinode_launcher": "standard",
            "gradient_accumulation_steps": told["deepspeed"]["gradient_accumulation_steps"],
            "gradient_clipping": told["deepspeed"]["gradient_clipping"],
            "zero_stage": told["deepspeed"]["zero_optimization"]["stage"],
            "zero3_init_flag": False,
        }
    if "fully_shard" in told:
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_offload_params": told["fully_shard"]["cpu_offload"],
            "fsdp_reshard_after_forward": told["fully_shard"]["reshard_after_forward"],
        }
    return config


def _type_of(engine: str, world_size: int) -> str:
    if engine.startswith("zero"):
        return "DEEPSPEED"
    if engine == "fsdp":
        return "FSDP"
    return "MULTI_GPU" if world_size > 1 else "NO"


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False)
