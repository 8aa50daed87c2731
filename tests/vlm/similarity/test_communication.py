"""Bytes sent by a step of `clip`, counted where tensors meet torch.distributed, against the formulas of docstrings."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from tests.ranks import run_ranks
from tests.vlm.objectives.batches import batch_of, outputs_of
from vlm.distributed.world import World
from vlm.objectives.step import pair_step
from vlm.objectives.terms.clip import Clip
from vlm.similarity.config import SimilarityConfig
from vlm.similarity.exchange import Exchange

COUNTS: dict[int, tuple[int, ...]] = {2: (9, 5), 3: (6, 8, 3), 4: (4, 7, 2, 5)}
DIM = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "gather": {"exchange": "gather"},
    "gather, bf16": {"exchange": "gather", "wire": "bf16"},
    "ring": {"exchange": "ring"},
    "ring, bf16": {"exchange": "ring", "wire": "bf16"},
    "groups": {"exchange": "gather", "group_ranks": 2},
    "ring in groups": {"exchange": "ring", "group_ranks": 2},
}


class Counter:
    """Bytes that this rank sends: each collective's tensors by what a circle of ranks makes of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sent = 0.0
        for name, volume in (
            ("all_gather_into_tensor", lambda size, out, own: (size - 1) * own.nbytes),
            ("reduce_scatter_tensor", lambda size, own, parts: (size - 1) * own.nbytes),
            ("all_to_all_single", lambda size, out, parts: (size - 1) / size * parts.nbytes),
            ("all_reduce", lambda size, total: 2 * (size - 1) / size * total.nbytes),
        ):
            patch.setattr(dist, name, self._counted(getattr(dist, name), volume))
        one_by_one = dist.batch_isend_irecv

        def passed_on(operations: list[dist.P2POp]) -> list[dist.Work]:
            self.sent += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
            return one_by_one(operations)

        patch.setattr(dist, "batch_isend_irecv", passed_on)
        for name in ("all_gather", "broadcast", "reduce", "gather", "scatter", "all_to_all", "send", "isend"):
            if name != "isend":
                patch.delattr(dist, name)  # nothing goes another way

    def _counted(self, collective: Callable[..., Any], volume: Callable[..., float]) -> Callable[..., Any]:
        def counted(*arguments: Any, group: dist.ProcessGroup | None = None) -> Any:
            tensors = [one for one in arguments if isinstance(one, Tensor)]
            self.sent += volume(dist.get_world_size(group), *tensors)
            return collective(*arguments, group=group)

        return counted


def on_this_rank(counts: tuple[int, ...], settings: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Bytes sent in the forward and backward of one step, by setting."""
    world = World.current()
    num_rows = counts[world.rank]
    batch = batch_of(torch.arange(num_rows) + 100 * world.rank)
    sent = {}
    for name, setting in settings.items():
        exchange = Exchange(world, SimilarityConfig(**setting))
        image, text = (normalize(torch.randn(num_rows, DIM), dim=1).requires_grad_() for _ in range(2))
        scale = torch.tensor([14.3], requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            counter = Counter(patch)
            Clip()(pair_step(outputs_of(image, text, scale), batch, exchange)).backward()
        sent[name] = counter.sent
    return sent


@cache
def counted(size: int) -> list[dict[str, float]]:
    settings = {name: setting for name, setting in SETTINGS.items() if size == 4 or "group_ranks" not in setting}
    return run_ranks(on_this_rank, size, COUNTS[size], settings)


def formula(counts: tuple[int, ...], num_ranks: int, exchange: str, wire_bytes: int) -> float:
    """`RowGroup`'s, for a group with `counts` rows among `num_ranks` ranks in all."""
    size, fullest, total = len(counts), max(counts), sum(counts)
    vectors = (size - 1) * fullest * (2 * DIM * wire_bytes + 8 + 4) + 16 * (size - 1) / size * total
    ring = 4 * size * fullest * DIM + 16 * (size - 1) / size if exchange == "ring" else 0.0
    return vectors + ring + 16 * (num_ranks - 1)


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("setting", ["gather", "gather, bf16", "ring", "ring, bf16"])
def test_bytes_sent_are_those_of_the_formula(size: int, setting: str) -> None:
    exchange = SETTINGS[setting]["exchange"]
    expected = formula(COUNTS[size], size, exchange, 2 if "bf16" in setting else 4)
    for sent in counted(size):
        assert sent[setting] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("setting", ["groups", "ring in groups"])
def test_a_group_sends_what_its_own_size_says(setting: str) -> None:
    for rank, sent in enumerate(counted(4)):
        counts = COUNTS[4][:2] if rank < 2 else COUNTS[4][2:]
        expected = formula(counts, 4, SETTINGS[setting]["exchange"], 4)
        assert sent[setting] == pytest.approx(expected, rel=1e-12)
