"""Memory of a rank by part, at the moment of a step when it is most."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from launch.plan.engines import Shares
from launch.plan.work import Work
from vlm.objectives.objective import Objective
from vlm.similarity import tiles
from vlm.similarity.config import SimilarityConfig

_BYTES = 4
_HELD_TILES = 4  # products, their derivative, and two more that kernels make of them


@dataclass(frozen=True)
class Load:
    """What a rank has to do in a step: its rows in micro-batches of so many, and the global batch."""

    rows: int
    micro_batch: int
    global_batch: int

    @property
    def micro_batches(self) -> int:
        """Forwards with a graph a step."""
        return -(-self.rows // self.micro_batch)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by part, at the peak, and the phase of the step that the peak is in."""

    parts: Mapping[str, float]
    phase: str
    host: float

    @property
    def peak(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class PairWork:
    """The comparison of a rank's rows with all columns: the bytes that it holds, of rows, columns and tiles."""

    rows: float
    columns: float
    tiles: float


def pair_work(objective: Objective, similarity: SimilarityConfig, load: Load, ranks: int, *, on_gpu: bool) -> PairWork:
    """What the pair terms of an objective hold while they are evaluated; nothing where it has none."""
    if not objective.pair_terms:
        return PairWork(0.0, 0.0, 0.0)
    kinds, dim = len(objective.pair_needs.outputs), objective.facts.dim
    group = similarity.group_ranks or ranks
    columns = min(load.global_batch, load.rows * group)
    held = load.rows * 2 if similarity.exchange == "ring" else columns
    # Gathered rows, their gradient, and that gradient once more as it is sent home; of rows here the gradient alone.
    gathered = max(1, len(objective.pair_needs.gathered)) * held * dim * _BYTES * (3 if group > 1 else 1)
    tile_rows, tile_columns = (
        (tiles._CUDA_TILE_ROWS, tiles._CUDA_TILE_COLUMNS) if on_gpu else (tiles._TILE_ROWS, tiles._TILE_COLUMNS)
    )
    tile = min(load.rows, tile_rows) * min(columns, tile_columns) * _BYTES
    return PairWork(2 * kinds * load.rows * dim * _BYTES, gathered, _HELD_TILES * tile)


def batch_bytes(rows: int, image_size: int, length: int) -> float:
    """A rank's rows as they come from the data: pixels and tokens."""
    return float(rows * (3 * image_size**2 + 8 * length))


def state_bytes(objective: Objective) -> float:
    """What terms and providers remember from step to step."""
    kept = chain.from_iterable(
        (*state.replicated().values(), *state.local().values()) for state in objective.states.values()
    )
    return float(sum(tensor.numel() * tensor.itemsize for tensor in kept))


def memory_of(
    shares: Shares, work: Work, load: Load, pairs: PairWork, *, held: Mapping[str, float], averages: int, on_gpu: bool
) -> Memory:
    """The memory of a rank under an engine; `held` is what is there all the time beside the model, by part.

    A single micro-batch keeps its graph while pairs are compared, and its gradients grow while the graph shrinks; of
    several, each meets the whole gradients of those before it.
    """
    rows = min(load.rows, load.micro_batch)
    constant = {
        "weights": shares.weights,
        "moments": shares.moments,
        "averages": averages * shares.copies,
        "buffers": shares.buffers,
        **held,
    }
    several = load.micro_batches > 1
    phases: dict[str, dict[str, float]] = {}
    forward, backward = work.held("forward", rows), work.held("backward", rows)
    before = {"gradients": shares.added if several else shares.gradients, "gathered weights": shares.gathered}
    embeddings = {"rows of pairs": pairs.rows}
    travelling = {} if on_gpu else {"weights on their way": shares.message}
    phases["forward"] = {**before, **embeddings, **travelling, "activations": float(forward.others.max())}
    growing = 0.0 if several else shares.growing
    for phase, passing, more in (("backward", 0.0, travelling), ("backward, reducing", shares.passing, {})):
        gradients, most = backward.peak(growing, passing, math.inf if several else shares.bucket)
        phases[phase] = {**before, **embeddings, **more, "activations": most}
        phases[phase]["gradients"] += gradients
    compared = {**embeddings, "gathered columns": pairs.columns, "similarity tiles": pairs.tiles}
    kept = 0.0 if several else float(forward.others[-1])
    phases["comparison of pairs"] = {"gradients": shares.gradients, **compared, "activations": kept}
    finished = shares.gradients + shares.growing * float(backward.gradients[-1])
    phases["update"] = {"gradients": finished, "update": shares.in_step}
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = {name: size for name, size in {**constant, **phases[phase]}.items() if size}
    return Memory(parts, phase, shares.host)
