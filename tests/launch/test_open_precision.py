"""`precision: auto`: the faster one of the machine on which a run begins, and the run's from then on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from launch.nodes.show_config import accelerate_config, told_config
from launch.plan.gpu import Gpu
from launch.recipe import load_recipe, settled
from launch.recipe_file import read_recipe
from launch.train import train
from tests.launch.tiny import assert_same_run, stopped_at, write_tiny, write_tiny_recipe
from vlm.training import precision
from vlm.training.config import TrainingConfig
from vlm.training.precision import ProductTimes, cpu_product_times, faster_precision, slow_precision

Machine = Callable[[float], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Puts the process on another machine, where a product in bf16 takes so many times as long as one in fp32."""
    count = iter(range(9))

    def move(ratio: float) -> None:
        monkeypatch.setenv("VLM_CACHE", str(tmp_path / f"cache-{next(count)}"))
        monkeypatch.setattr(precision, "_measure", lambda: ProductTimes(fp32=1.0, bf16=ratio))

    return move


def test_the_faster_one_is_chosen_and_a_slow_one_told(machine: Machine) -> None:
    machine(0.3)
    assert faster_precision() == "bf16"
    assert slow_precision("bf16") is None
    machine(30.0)
    assert faster_precision() == "fp32"
    assert slow_precision("fp32") is None
    assert slow_precision("bf16") == (
        "precision bf16: this processor takes 30.0 times as long for a product as in fp32"
    )


def test_both_are_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    times = cpu_product_times()
    assert 0 < times.fp32 < 10
    assert 0 < times.bf16 < 10
    assert cpu_product_times() == times


@pytest.mark.parametrize(("ratio", "product"), [(0.5, "bf16"), (2.0, "fp32")])
def test_pairs_are_compared_in_what_the_towers_turn_out_to_be_in(machine: Machine, ratio: float, product: str) -> None:
    machine(ratio)
    config = TrainingConfig.model_validate({"precision": "auto"})
    assert config.decided_precision == config.comparison.product == product


@pytest.mark.parametrize(("ratio", "chosen"), [(0.5, "bf16"), (2.0, "fp32")])
def test_a_run_goes_on_as_it_began_on_a_machine_that_would_choose_otherwise(
    tmp_path: Path, machine: Machine, ratio: float, chosen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    write_tiny(tmp_path / "data")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    machine(ratio)
    train(load_recipe(write_tiny_recipe(tmp_path / "data", whole, precision="auto")))
    assert yaml.safe_load((whole / "recipe.yaml").read_text())["precision"] == chosen
    machine(1 / ratio)
    recipe = load_recipe(write_tiny_recipe(tmp_path / "data", stopped_at(whole, 6, resumed), precision="auto"))
    train(recipe, resume="auto")
    assert_same_run(resumed, whole)
    said = capsys.readouterr().out
    assert said.count(f"precision {chosen}") >= 2
    assert ("2.0 times as long for a product as in fp32; precision: auto would choose fp32" in said) is (ratio < 1)


def test_what_is_started_on_other_machines_is_in_their_precision(machine: Machine) -> None:
    machine(30.0)
    recipe = load_recipe("scenes")
    assert recipe.precision == "auto"
    assert settled(recipe).precision == "fp32"
    assert accelerate_config(recipe, 2, 8)["mixed_precision"] == "bf16"
    assert told_config(recipe, 2, 8)["engine"]["precision"] == "bf16"
    figures = {"memory_gb": 80, "bf16_tflops": 989, "fp32_tflops": 67, "memory_gb_s": 3350}
    more = {"link_gb_s": 450, "network_gb_s": 50, "cores": 16}
    assert Gpu.model_validate({**figures, **more}).faster_precision == "bf16"
    assert Gpu.model_validate({**figures, **more, "bf16_tflops": 2}).faster_precision == "fp32"


def test_recipes_for_a_small_machine_leave_it_open() -> None:
    for name in ("scenes", "coca-tiny", "flickr8k-tiny", "text-only-captions"):
        assert read_recipe(name, [])[1]["precision"] == "auto"
