"""Global contrastive losses written out pair by pair, with a dictionary of each sample's numbers."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.vlm.objectives.parity import Setting, Whole, leaves, whole


@dataclass
class ByHand:
    """The papers' loops in float64: what each image and text remembers, by sample id, and what a step makes of it.

    `scheme` says what multiplies log(eps + s): nothing ("none"), a constant temperature ("constant"), the model's
    ("model"), or each sample's own ("own").
    """

    scheme: str = "own"
    gammas: tuple[float, ...] = (0.8,) * 20
    rho: float = 8.0
    temperature: float = 0.01
    bounds: tuple[float, float] = (5e-3, 1.0)
    rate: float = 0.03
    momentum: float = 0.9
    limit: float = 5.0
    eps: float = 1e-14
    memory: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)

    def __call__(self, batch: Whole, step: int = 0) -> Tensor:
        """The value of a step, its gradient that under constant weights; the memory is brought up to date."""
        total = torch.zeros((), dtype=torch.float64)
        new: dict[tuple[str, int], dict[str, float]] = {}
        for side, anchors, others in (("image", batch.image, batch.text), ("text", batch.text, batch.image)):
            for i, sample in enumerate(batch.ids.tolist()):
                old = self.memory.get((side, sample), {"s": math.nan, "tau": self.temperature, "u": 0.0})
                contrasts = [
                    anchors[i] @ others[j] - anchors[i] @ others[i]
                    for j, other in enumerate(batch.ids.tolist())
                    if other != sample
                ]
                value, now = self._of_anchor(torch.stack(contrasts), old, batch.scale, self.gammas[step])
                total = total + value
                new.setdefault((side, sample), now)  # of a sample that is there twice, the first
        self.memory.update(new)
        return total / (2 * len(batch.ids))

    def _of_anchor(
        self, contrasts: Tensor, old: dict[str, float], scale: Tensor, gamma: float
    ) -> tuple[Tensor, dict[str, float]]:
        tau = 1 / scale[0] if self.scheme in ("none", "model") else torch.tensor(old["tau"], dtype=torch.float64)
        g = (contrasts / tau).exp().mean()
        now_g = float(g.detach())
        s = now_g if math.isnan(old["s"]) else (1 - gamma) * old["s"] + gamma * now_g
        # value log(eps + s), gradient d g / (eps + s)
        log_average = math.log(self.eps + s) + (g - g.detach()) / (self.eps + s)
        factor = torch.ones_like(tau) if self.scheme == "none" else tau
        rho = self.rho if self.scheme in ("own", "model") else 0.0
        now = {"s": s, "tau": float(tau.detach()), "u": 0.0}
        if self.scheme == "own":
            exponents = contrasts.detach() / tau
            slope = math.log(self.eps + s) + rho - float((exponents.exp() / (self.eps + s) * exponents).mean())
            now["u"] = (1 - self.momentum) * old["u"] + self.momentum * min(max(slope, -self.limit), self.limit)
            now["tau"] = min(max(old["tau"] - self.rate * now["u"], self.bounds[0]), self.bounds[1])
        return factor * (log_average + rho), now


def expected(setting: Setting, by_hand: ByHand) -> dict[str, Tensor]:
    """Value and gradients of the setting's last step, after all steps before it by hand."""
    memory = replace(by_hand, memory={})
    for step in range(setting.num_steps):
        raw = leaves(setting, step)
        value = memory(whole(setting, raw), step)
    value.backward()
    by_hand.memory = memory.memory
    gradients = {name: leaf.grad for name, leaf in raw.items() if leaf.grad is not None}
    return {"value": value.detach(), **gradients}
