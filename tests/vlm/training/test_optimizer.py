"""One step of AdamW as its formula has it, each tower at its own rate, under engines that shard the moments."""

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.training.toy import WHOLE, Setup, start, toy_batch, train_state
from vlm.training.accumulation import accumulate
from vlm.training.engines.registry import EngineName
from vlm.training.optimizers.rates import LrScale

LR, DECAY, EPS = 0.01, 0.1, 1e-6


def one_step(setup: Setup, world_size: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Each weight before, its gradient, and the weight after."""
    engine = start(setup, world_size)
    batch = toy_batch(0, engine.world.rank, world_size)
    engine.warm_up(batch)
    accumulate(engine, train_state(engine).objective, batch, WHOLE, seed=0)
    with torch.no_grad():
        before = {name: (engine.weight(name).clone(), engine.gradient(name)) for name in engine.parameters()}
        engine.step(LR)
        told = {name: (*pair, engine.weight(name).clone()) for name, pair in before.items()}
    engine.accelerator.end_training()
    return told


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 1), ("zero2", 2), ("zero3", 2), ("fsdp", 2)])
def test_the_rate_of_a_parameter_is_its_factors_of_the_rate(engine: EngineName, world_size: int) -> None:
    """After one step the moments are g and g squared: w - lr f (g / (|g| + eps) + decay w)."""
    layers = {"image.0.weight": 0.25, "image.0.bias": 0.25, "image.2.weight": 0.5, "image.2.bias": 0.5}
    scale = LrScale(image=0.25, text=2.0)
    setup = Setup(engine, max_grad_norm=None, weight_decay=DECAY, lr_scale=scale, layer_factors=layers)
    told = run_ranks(one_step, world_size, setup, world_size, group=False)[0]
    factors = {"image": 0.25, "text": 2.0, "logit_scale": 1.0}
    assert {name.partition(".")[0] for name in told} == factors.keys()
    for name, (before, gradient, after) in told.items():
        before, gradient, after = before.double(), gradient.double(), after.double()
        decay = 0.0 if name in ("logit_scale", "image.0.bias") else DECAY
        factor = factors[name.partition(".")[0]] * layers.get(name, 1.0)
        moved = LR * factor * (gradient / (gradient.abs() + EPS) + decay * before)
        torch.testing.assert_close(after, before - moved, rtol=1e-6, atol=1e-6, msg=name)
