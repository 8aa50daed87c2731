"""Optimizers that look at whole tensors, where a rank has rows of each: a tensor at a time is put together."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class OnWholes(torch.optim.Optimizer):
    """An optimizer whose update of a tensor that is cut into rows is made on the whole of it.

    Weights, gradient and state of one tensor are gathered, every rank updates them as it would under DDP, to the same
    bits, and keeps its rows. State of another shape than the parameter's is whole on every rank. To be derived from
    together with `on_wholes`, which does the work.
    """

    on_wholes: ClassVar[type[torch.optim.Optimizer]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """An update of all parameters. Collective where they are cut."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if not any(isinstance(parameter, DTensor) for parameter in parameters):
            return super().step(closure)
        loss = None if closure is None else closure()
        for group in self.param_groups:
            options = {name: value for name, value in group.items() if name in self.defaults}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, options)
        return loss

    def _update(self, parameter: DTensor, options: dict[str, Any]) -> None:
        whole = nn.Parameter(_whole(parameter.detach()))
        whole.grad = _whole(parameter.grad)
        optimizer = self.on_wholes([whole], **options)
        optimizer.state[whole] = {name: _whole(value) for name, value in self.state[parameter].items()}
        optimizer.step()
        parameter.to_local().copy_(_rows(whole.detach(), parameter).to_local())
        self.state[parameter] = {
            name: _rows(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
            for name, value in optimizer.state[whole].items()
        }


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _rows(whole: Tensor, like: DTensor) -> DTensor:
    """This rank's rows of what every rank has whole, without a message."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
