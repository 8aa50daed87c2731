"""Each optimizer that ships: its library's own steps, its first step in closed form, a resume to the same bits."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm.optim
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tests.ranks import run_ranks
from tests.vlm.training.test_optimizer import one_step
from tests.vlm.training.toy import HIDDEN, WHOLE, Setup, start, toy_batch, toy_model, train_state
from tests.vlm.training.toy_life import life
from vlm.errors import EveryRankError, UserError
from vlm.objectives import functional
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import Engine
from vlm.training.engines.ddp import DdpEngine
from vlm.training.engines.options import LAYOUTS, EngineOptions, Layout, OffloadConfig
from vlm.training.engines.registry import EngineName
from vlm.training.optimizers.adafactor import Adafactor
from vlm.training.optimizers.adamw_8bit import AdamW8bit
from vlm.training.optimizers.base import OPTIMIZERS, OptimizerConfig
from vlm.training.optimizers.lamb import Lamb
from vlm.training.optimizers.muon import Muon
from vlm.training.step import train_step

NUM_STEPS, LR, DECAY = 4, 0.01, 0.1
UNDECAYED = ("logit_scale", "image.0.bias")
# One Newton-Schulz step: more of them make noise of a gradient of low rank as large as what it says.
MUON = Muon(kind="muon", lr=LR, weight_decay=DECAY, iterations=1)
LAMB = Lamb(kind="lamb", lr=LR, weight_decay=DECAY)
ADAFACTOR = Adafactor(kind="adafactor", lr=LR, weight_decay=DECAY)
EIGHT_BIT = AdamW8bit(kind="adamw_8bit", lr=LR, weight_decay=DECAY)


def groups(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    plain = [parameter for name, parameter in named.items() if name in UNDECAYED]
    decayed = [parameter for name, parameter in named.items() if name not in UNDECAYED]
    return [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]


def muon(named: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    matrices = [named[name] for name in HIDDEN]
    rest = {name: parameter for name, parameter in named.items() if name not in HIDDEN}
    return [
        torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, ns_steps=1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups(rest), lr=LR, betas=(0.9, 0.98), eps=1e-6, fused=True),
    ]


def lamb(named: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [timm.optim.Lamb(groups(named), lr=LR, max_grad_norm=None)]


def adafactor(named: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adafactor(groups(named), lr=LR)]


def eight_bit(named: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return [bitsandbytes.optim.AdamW8bit(groups(named), lr=LR, betas=(0.9, 0.98), eps=1e-6)]


Libraries = Callable[[dict[str, nn.Parameter]], list[torch.optim.Optimizer]]


def library_loop(libraries: Libraries) -> dict[str, Tensor]:
    """The toy's weights after all steps of a plain loop around the library's own optimizers."""
    model = toy_model(Setup())
    optimizers = libraries({name: p for name, p in model.named_parameters() if p.requires_grad})
    for step in range(NUM_STEPS):
        outputs = model(toy_batch(step, 0, 1).parts, frozenset({"image", "text"}))
        functional.clip(outputs["image"], outputs["text"], outputs["logit_scale"]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {f"weights/{name}": tensor for name, tensor in model.state_dict().items()}


def lived(
    config: OptimizerConfig,
    engine: EngineName,
    world_size: int,
    folder: Path,
    first: int,
    options: EngineOptions | None = None,
) -> dict[str, Tensor]:
    """The state after the last step of a life in processes of its own, or here on one rank."""
    setup = Setup(engine, max_grad_norm=None, optimizer=config, options=options or EngineOptions())
    arguments = (setup, world_size, str(folder), first, NUM_STEPS, LR)
    if world_size == 1:
        return life(*arguments)
    whole: dict[str, Tensor] = run_ranks(life, world_size, *arguments, group=False)[0]
    return whole


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Weights moved alike, but for the roundings of bf16 where a step is computed in it."""
    before = {f"weights/{name}": tensor for name, tensor in toy_model(Setup()).state_dict().items()}
    for name in before:
        moved, wanted = found[name] - before[name], expected[name] - before[name]
        torch.testing.assert_close(moved, wanted, rtol=0, atol=float(0.01 * wanted.abs().max()) + 1e-7, msg=name)


@pytest.mark.parametrize(
    ("config", "libraries"), [(MUON, muon), (LAMB, lamb), (ADAFACTOR, adafactor), (EIGHT_BIT, eight_bit)]
)
def test_the_librarys_own_steps_and_a_resume_to_the_same_bits(
    tmp_path: Path, config: OptimizerConfig, libraries: Libraries
) -> None:
    expected = library_loop(libraries)
    whole = lived(config, "ddp", 1, tmp_path, 0)
    assert {name.partition("/")[0] for name in whole} == {"weights", *config.moments}
    for name, tensor in expected.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert_same(lived(config, "ddp", 1, tmp_path, NUM_STEPS // 2), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "libraries"), [(MUON, muon), (LAMB, lamb), (ADAFACTOR, adafactor)])
def test_on_two_ranks_whole_and_in_rows(tmp_path: Path, config: OptimizerConfig, libraries: Libraries) -> None:
    """DDP, a resume of it, FSDP2 from its checkpoint, and a resume of that from a checkpoint of its own."""
    half = NUM_STEPS // 2
    whole = lived(config, "ddp", 2, tmp_path, 0)
    shutil.copytree(tmp_path, tmp_path / "again")
    assert_near(whole, library_loop(libraries))
    in_rows = lived(config, "fsdp", 2, tmp_path, half)
    assert in_rows.keys() == whole.keys()
    assert_near(in_rows, whole)
    assert_same(lived(config, "fsdp", 2, tmp_path, half + 1), in_rows)
    assert_same(lived(config, "ddp", 2, tmp_path / "again", half), whole)


@pytest.mark.long
@pytest.mark.parametrize("config", [MUON, LAMB, ADAFACTOR])
def test_rows_that_are_shared_within_groups_of_ranks(tmp_path: Path, config: OptimizerConfig) -> None:
    in_groups = lived(config, "fsdp", 4, tmp_path, 0, EngineOptions(shard_group=2))
    assert_near(in_groups, lived(config, "ddp", 4, tmp_path / "whole", 0))
    assert_same(lived(config, "fsdp", 4, tmp_path, NUM_STEPS // 2, EngineOptions(shard_group=2)), in_groups)


def adam(gradient: Tensor) -> Tensor:
    """The first step: means are the gradient and its square."""
    return gradient / (gradient.abs() + 1e-6)


def lamb_after(weight: Tensor, gradient: Tensor, decay: float, lr: float) -> Tensor:
    """w - lr |w| / |u| u of u = g / (|g| + eps) + decay w; without decay w - lr u."""
    step = adam(gradient) + decay * weight
    norms = weight.norm(), step.norm()
    ratio = norms[0] / norms[1] if decay and min(norms) > 0 else 1.0
    return weight - lr * ratio * step


def adafactor_after(weight: Tensor, gradient: Tensor, decay: float, lr: float) -> Tensor:
    """The gradient over the root of R C / mean(R), of root mean square 1 at most, times lr max(1e-3, RMS(w))."""
    squares, tiny = gradient.square(), torch.finfo(torch.float32).eps
    if gradient.ndim > 1:
        rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
        squares = rows * columns / rows.mean().clamp(min=tiny)
    step = gradient / squares.clamp(min=tiny**2).sqrt()
    step = step / max(1.0, float(step.square().mean().sqrt()))
    return (1 - lr * decay) * weight - lr * max(1e-3, float(weight.square().mean().sqrt())) * step


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 1), ("fsdp", 2)])
@pytest.mark.parametrize(("config", "after"), [(LAMB, lamb_after), (ADAFACTOR, adafactor_after)])
def test_the_first_step_has_its_closed_form(
    config: OptimizerConfig, after: Callable[..., Tensor], engine: EngineName, world_size: int
) -> None:
    told = run_ranks(
        one_step, world_size, Setup(engine, max_grad_norm=None, optimizer=config), world_size, group=False
    )[0]
    for name, (weight, gradient, found) in told.items():
        decay = 0.0 if name in UNDECAYED else DECAY
        expected = after(weight.double(), gradient.double(), decay, LR)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_of_muon_is_nearly_orthogonal_and_as_large_as_one_of_adamw() -> None:
    """After five Newton-Schulz steps singular values lie near 1, so that entries have 0.2 of the rate (RMS)."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 256))
    built = Muon(kind="muon", lr=LR).build([{"params": [weight], "weight_decay": 0.0, "hidden": True}])
    weight.grad = torch.randn(64, 256)
    built.step()
    values = torch.linalg.svdvals(weight.detach() / (LR * 0.2 * 256**0.5))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2 * LR, rel=0.15)


@pytest.mark.parametrize("engine", sorted(LAYOUTS))
@pytest.mark.parametrize("kind", sorted(OPTIMIZERS.all()))
def test_an_engine_that_does_not_carry_an_optimizer_is_refused_with_those_that_do(kind: str, engine: str) -> None:
    able = {
        "adamw": ["ddp", "fsdp", "zero1", "zero2", "zero3"],
        "adamw_8bit": ["ddp"],
    }.get(kind, ["ddp", "fsdp"])
    recipe = {"engine": engine, "optimizer": {"kind": kind}}
    if engine in able:
        assert TrainingConfig.model_validate(recipe).optimizer.kind == kind
        return
    line = (
        f"optimizer.kind: {kind} works on whole tensors, of which engine {engine} has parts; "
        f"it is for engine: {', '.join(able)}"
    )
    with pytest.raises(ValidationError, match=re.escape(line)):
        TrainingConfig.model_validate(recipe)


def test_what_sums_over_ranks_is_refused_where_shards_lie_on_the_cpu() -> None:
    options = EngineOptions(offload=OffloadConfig(parameters="cpu"))
    recipe = {"engine": "fsdp", "engine_options": options.model_dump(), "optimizer": {"kind": "lamb"}}
    with pytest.raises(ValidationError, match=r"engine_options.offload.parameters: found 'cpu'; lamb sums over the"):
        TrainingConfig.model_validate(recipe)
    assert TrainingConfig.model_validate({**recipe, "optimizer": {"kind": "adamw"}}).engine == "fsdp"


def test_eight_bits_without_bitsandbytes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"^optimizer.kind: found adamw_8bit, .*; pip install 'vlm\[8bit\]'$"):
        EIGHT_BIT.require_installed()
    with pytest.raises(UserError, match=r"pip install 'vlm\[8bit\]'$"):
        start(Setup("ddp", optimizer=EIGHT_BIT), 1)


class Factored(Adafactor):
    """Adafactor that says that all it keeps has the parameter's shape."""

    layouts: ClassVar[frozenset[Layout]] = frozenset({"whole"})

    def moments_of(self, parameter: Any) -> Any:
        return OptimizerConfig.moments_of(self, parameter)


def test_a_state_of_another_shape_than_was_said_ends_the_run_at_its_first_step() -> None:
    engine = start(Setup("ddp", optimizer=Factored(kind="adafactor", lr=LR)), 1)
    line = r"adafactor keeps 'row_var' of image.0.weight as \[600, 1\], where its `moments_of` says \[600, 48\]"
    with pytest.raises(EveryRankError, match=line):
        train_step(train_state(engine), toy_batch(0, 0, 1), WHOLE, seed=0, lr=LR)
    engine.accelerator.end_training()


class Parts(DdpEngine):
    """An engine of one's own that does not say that it has whole tensors."""

    layout: ClassVar[Layout] = Engine.layout


def test_what_works_on_whole_tensors_is_refused_by_an_engine_of_ones_own() -> None:
    setup = Setup("tests.vlm.training.test_optimizer_kinds:Parts", optimizer=ADAFACTOR)
    with pytest.raises(EveryRankError, match=r"adafactor works on whole tensors, of which engine .*:Parts has parts"):
        start(setup, 1)
