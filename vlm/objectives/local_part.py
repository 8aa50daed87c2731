"""The input of a local term: one micro-batch with the model's outputs, and the teacher's for the same samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vlm.batch import Batch
from vlm.objectives.state import TermState
from vlm.outputs import Outputs


@dataclass(frozen=True)
class LocalPart:
    """Samples that went through the towers together, as a local term sees them.

    `outputs` have the micro-batch's graph, but for the logit scale and bias, which are constants here: whether a step
    would lower a scale at its limit is a question to the gradient of the whole step. `state` and `parameters` are the
    term's own.
    """

    outputs: Outputs
    batch: Batch
    seed: int = 0
    teacher: Outputs = field(default_factory=dict)
    state: TermState | None = None
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
