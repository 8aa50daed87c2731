"""What is printed of accelerate's and DeepSpeed's configuration is what the recipe does."""

from pathlib import Path

import pytest
import yaml
from deepspeed.runtime.config import DeepSpeedConfig

from launch.nodes.show_config import accelerate_config, config_text, told_config
from launch.recipe import Recipe, check_recipe
from tests.launch.tiny import tiny_values
from vlm.training.launcher_settings import overrule_launcher


def recipe_of(folder: Path, engine: str, precision: str) -> Recipe:
    values = tiny_values(folder, folder / "run", engine=engine, precision=precision, micro_batch=2, max_grad_norm=0.7)
    return check_recipe(values, "recipe")


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeeds_own_reading_of_it_is_the_recipes(tmp_path: Path, engine: str) -> None:
    recipe = recipe_of(tmp_path, engine, "bf16")
    told = told_config(recipe, 2, 3)["deepspeed"]
    read = DeepSpeedConfig({**told, "train_batch_size": None} | {"train_micro_batch_size_per_gpu": 2})
    assert told["train_micro_batch_size_per_gpu"] * 6 == recipe.global_batch
    assert (read.gradient_accumulation_steps, read.gradient_clipping) == (1, recipe.max_grad_norm)
    assert (read.zero_config.stage, read.torch_autocast_enabled) == (int(engine[-1]), True)


@pytest.mark.parametrize(
    ("engine", "precision"), [("ddp", "fp32"), ("fsdp", "bf16"), ("zero2", "bf16"), ("zero3", "fp32")]
)
def test_accelerates_file_contradicts_nothing(tmp_path: Path, engine: str, precision: str) -> None:
    """Its names become variables, by accelerate's own rule, of which none says otherwise than the recipe."""
    recipe = recipe_of(tmp_path, engine, precision)
    config = accelerate_config(recipe, 2, 3)
    assert (config["num_machines"], config["num_processes"]) == (2, 6)
    environ = {"ACCELERATE_MIXED_PRECISION": config["mixed_precision"]}
    if "deepspeed_config" in config:
        told = config["deepspeed_config"]
        environ |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(told["zero_stage"]),
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(told["gradient_accumulation_steps"]),
            "ACCELERATE_GRADIENT_CLIPPING": str(told["gradient_clipping"]),
        }
    if "fsdp_config" in config:
        environ |= {"ACCELERATE_USE_FSDP": "true"}
        environ |= {name.upper(): str(value).lower() for name, value in config["fsdp_config"].items()}
    said = (recipe.engine, recipe.decided_precision)
    assert overrule_launcher(*said, dict(environ), max_grad_norm=recipe.max_grad_norm) == []
    other = {**environ, "ACCELERATE_GRADIENT_CLIPPING": "0.8"}
    assert overrule_launcher(*said, other, max_grad_norm=recipe.max_grad_norm)


def test_it_is_printed_as_yaml_with_the_engines_own_words(tmp_path: Path) -> None:
    text = config_text(recipe_of(tmp_path, "zero2", "bf16"), 2, 3)
    accelerate, engine, deepspeed = yaml.safe_load_all(text)
    assert accelerate["distributed_type"] == "DEEPSPEED"
    assert engine["rows_per_rank"] == 2
    assert deepspeed["gradient_clipping"] == 0.7
