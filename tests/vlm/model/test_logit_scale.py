"""The limited logit scale on one process; under every engine it is tested with the engines."""

import math

import pytest
import torch

from vlm.model.logit_scale import limited_scale


@pytest.mark.parametrize(
    ("log_scale", "sign", "passes"),
    [
        (math.log(50.0), 1.0, True),
        (math.log(50.0), -1.0, True),
        (math.log(200.0), 1.0, True),  # a step against it lowers the scale
        (math.log(200.0), -1.0, False),
    ],
)
def test_beyond_the_limit_only_gradients_that_lower_it_pass(log_scale: float, sign: float, passes: bool) -> None:
    parameter = torch.tensor([log_scale], dtype=torch.float64, requires_grad=True)
    scale = limited_scale(parameter)
    assert scale.item() == pytest.approx(min(100.0, math.exp(log_scale)))
    (sign * scale).backward()
    assert parameter.grad is not None
    expected = sign * min(100.0, math.exp(log_scale)) if passes else 0.0
    assert parameter.grad.item() == pytest.approx(expected)
