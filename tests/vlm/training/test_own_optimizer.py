"""An optimizer of one's own under every engine: torch's own steps in one process, and its state goes on elsewhere."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.training.toy import GLOBAL_BATCH, WHOLE, Setup, start, toy_batch, toy_model, train_state
from tests.vlm.training.toy_life import life
from vlm.errors import EveryRankError
from vlm.objectives import functional
from vlm.training.engines.registry import EngineName
from vlm.training.optimizers.base import OptimizerConfig
from vlm.training.step import train_step

NUM_STEPS, LR, DECAY = 6, 0.05, 0.01


class Momentum(OptimizerConfig):
    """Gradient descent with momentum."""

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    momentum: float = 0.8

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)


def setup(engine: EngineName) -> Setup:
    optimizer = Momentum(kind=f"{__name__}:Momentum", lr=LR, weight_decay=DECAY)
    return Setup(engine, max_grad_norm=None, optimizer=optimizer)


def one_process() -> dict[str, Tensor]:
    """The toy's weights and buffers after all steps of torch's own loop."""
    model = toy_model(Setup())
    decayed = {True: list[torch.nn.Parameter](), False: list[torch.nn.Parameter]()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed[name not in ("logit_scale", "image.0.bias")].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed[True], "weight_decay": DECAY},
        {"params": decayed[False]},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.8)
    for step in range(NUM_STEPS):
        batch = toy_batch(step, 0, 1, GLOBAL_BATCH)
        outputs = model(batch.parts, frozenset({"image", "text"}))
        optimizer.zero_grad()
        functional.clip(outputs["image"], outputs["text"], outputs["logit_scale"]).backward()
        optimizer.step()
    expected = {f"weights/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected[f"momentum_buffer/{name}"] = optimizer.state[parameter]["momentum_buffer"]
    return expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("ddp", 1), ("ddp", 1)),
        (("ddp", 2), ("zero2", 2)),
        (("zero1", 2), ("fsdp", 2)),
        (("fsdp", 2), ("zero3", 2)),
        (("zero3", 2), ("ddp", 1)),
    ],
)
def test_a_run_over_two_engines_is_torchs_own_loop(tmp_path: Path, first: Any, second: Any) -> None:
    half = NUM_STEPS // 2
    run_ranks(life, first[1], setup(first[0]), first[1], str(tmp_path), 0, half, LR, group=False)
    found = run_ranks(life, second[1], setup(second[0]), second[1], str(tmp_path), half, NUM_STEPS, LR, group=False)[0]
    expected = one_process()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


class Unnamed(Momentum):
    """A momentum that no checkpoint would hold."""

    moments: ClassVar[tuple[str, ...]] = ()


def test_a_state_that_no_checkpoint_would_hold_ends_the_run_at_its_first_step() -> None:
    optimizer = Unnamed(kind=f"{__name__}:Unnamed", lr=LR)
    engine = start(Setup("ddp", optimizer=optimizer), 1)
    batch = toy_batch(0, 0, 1)
    with pytest.raises(EveryRankError, match=r"optimizer.kind: .*Unnamed keeps 'momentum_buffer' of each parameter"):
        train_step(train_state(engine), batch, WHOLE, seed=0, lr=LR)
    engine.accelerator.end_training()


class Silent(OptimizerConfig):
    """An optimizer that does not say what it keeps."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr)


class Odd(Momentum):
    """A momentum whose name cannot be a file's."""

    moments: ClassVar[tuple[str, ...]] = ("Momentum",)


def test_what_an_optimizer_keeps_has_names_that_files_can_have() -> None:
    with pytest.raises(ValueError, match="Odd has the moment 'Momentum', which is no file's name"):
        Odd(kind=f"{__name__}:Odd")


def test_an_optimizer_says_what_it_keeps() -> None:
    with pytest.raises(ValueError, match="Silent has no `moments`"):
        Silent(kind=f"{__name__}:Silent")
