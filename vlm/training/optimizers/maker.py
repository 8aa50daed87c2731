"""The optimizer of a module: its parameters in groups, each with its weight decay and its factor of the rate."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import EveryRankError
from vlm.training.optimizers.base import Moment, OptimizerConfig
from vlm.training.optimizers.parameters import ParameterFacts, parameter_facts
from vlm.training.optimizers.rates import LrDecay, LrScale


@dataclass(frozen=True)
class OptimizerMaker:
    """The function that builds a module's optimizer of its trainable parameters, on each of which it has the `facts`.

    They are taken before an engine shards the parameters: some depend on their shapes.
    """

    config: OptimizerConfig
    facts: Mapping[str, ParameterFacts]

    @property
    def moments(self) -> Mapping[str, Mapping[str, Moment]]:
        """What the optimizer keeps of each trainable parameter, by its name and that of the moment."""
        return {name: self.config.moments_of(facts) for name, facts in self.facts.items()}

    def state_of(self, moments: Mapping[str, Tensor], num_updates: int, device: torch.device) -> dict[str, Any]:
        """The optimizer's state of a parameter with these moments, after so many updates."""
        return self.config.state_of(moments, num_updates, device)

    def __call__(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a module's trainable parameters.

        Each group of parameters has its factor of the learning rate as `lr_scale`, which `set_lr` follows. Raises
        EveryRankError when nothing trains.
        """
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
        for decays in (True, False):
            for name, parameter in trained.items():
                facts = self.facts[name]
                if facts.decays is decays:
                    decay = self.config.weight_decay if decays else 0.0
                    hidden = self.config.separates_hidden and facts.hidden
                    groups.setdefault((facts.lr_factor, decay, hidden), []).append(parameter)
        if not groups:
            raise EveryRankError(
                "model.lock: nothing is left to train: neither a tower, nor a projection, nor the scale"
            )
        optimizer = self.config.build(
            [
                {"params": parameters, "weight_decay": decay, "lr_scale": factor, "hidden": hidden}
                for (factor, decay, hidden), parameters in groups.items()
            ]
        )
        set_lr(optimizer.param_groups, self.config.lr)
        self._check_after_first_step(optimizer, trained)
        return optimizer

    def _check_after_first_step(self, optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> None:
        def check(stepped: torch.optim.Optimizer, *_: object) -> None:
            handle.remove()
            self._require_saved(stepped)
            for name, parameter in trained.items():
                self._require_as_said(name, stepped.state.get(parameter, {}))

        handle = optimizer.register_step_post_hook(check)

    def _require_saved(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise EveryRankError for a state that no checkpoint would hold: a run could not go on exactly."""
        kept = {name for state in optimizer.state.values() for name, value in state.items() if value is not None}
        if lost := sorted(kept - {"step", *self.config.moments, *self.config.remade}):
            raise EveryRankError(
                f"optimizer.kind: {self.config.kind} keeps {lost[0]!r} of each parameter, which its `moments` do not "
                "name: checkpoints would lack it"
            )

    def _require_as_said(self, name: str, state: Mapping[str, Any]) -> None:
        """Raise EveryRankError for a state of another shape than `moments_of` says: no resumed run would take it."""
        said = self.config.moments_of(self.facts[name])
        for moment in self.config.moments:
            value = state.get(moment)
            if value is None or (moment in said and tuple(value.shape) == said[moment].shape):
                continue
            expected = f"{list(said[moment].shape)}" if moment in said else "nothing"
            raise EveryRankError(
                f"optimizer.kind: {self.config.kind} keeps {moment!r} of {name} as {list(value.shape)}, where its "
                f"`moments_of` says {expected}: no run could go on with it"
            )


def optimizer_maker(config: OptimizerConfig, model: nn.Module) -> OptimizerMaker:
    """The function that builds the optimizer of a whole model. See `parameter_facts`, and what it raises."""
    return OptimizerMaker(config, parameter_facts(model, config.lr_scale, config.lr_decay, config.undecayed))


def set_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Give each group of parameters its learning rate: `lr` times its factor."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def moment_bytes(config: OptimizerConfig, model: nn.Module) -> int:
    """The bytes of an optimizer's moments of a whole model, whose tensors may be shapes alone."""
    kept = OptimizerMaker(config, parameter_facts(model, LrScale(), LrDecay())).moments.values()
    moments = [moment for one in kept for moment in one.values()]
    return sum(torch.Size(moment.shape).numel() * moment.dtype.itemsize for moment in moments)
