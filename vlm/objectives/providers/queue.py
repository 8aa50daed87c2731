"""A memory of the teacher's embeddings of past steps, and the provider that adds it to the negatives."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.distributed.row_group import RowGroup
from vlm.objectives.pairs import ExtraNegatives, Pairs
from vlm.objectives.providers.extra_negatives import SharedNegatives
from vlm.objectives.registry import PROVIDERS
from vlm.objectives.state import RunFacts, TermState
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, Provider


class Keys(NamedTuple):
    """Embeddings of both kinds (`image` the first, `text` the second) without gradient, and the samples they are of."""

    image: Float[Tensor, "keys dim"]
    text: Float[Tensor, "keys dim"]
    ids: Int64[Tensor, " keys"]


class EmbeddingQueue(TermState):
    """The last `size` keys in fp32, the same on every rank: a ring buffer that takes batches of any size.

    A step proposes its keys and reads those of earlier steps. The key that is written n-th lies at n mod size.
    """

    def __init__(self, size: int, facts: RunFacts) -> None:
        device = facts.world.device
        self._keys = Keys(
            torch.zeros(size, facts.dim, device=device),
            torch.zeros(size, facts.dim, device=device),
            torch.zeros(size, dtype=torch.int64, device=device),
        )
        self._num_written = 0
        self._proposed: Keys | None = None

    @property
    def size(self) -> int:
        """How many keys it holds when it is full."""
        return len(self._keys.ids)

    @property
    def keys(self) -> Keys:
        """The keys that it holds now; views, valid until the next commit."""
        count = min(self._num_written, self.size)
        return Keys(*(tensor[:count] for tensor in self._keys))

    def propose(self, keys: Keys) -> None:
        """Write these when the step is committed."""
        self._proposed = keys

    def commit(self) -> None:  # noqa: D102
        if self._proposed is not None:
            self._write(self._proposed)
        self._proposed = None

    def proposal_check(self) -> Float[Tensor, ""] | None:  # noqa: D102
        if self._proposed is None:
            return None
        return 0.0 * (self._proposed.image.sum() + self._proposed.text.sum())

    def discard(self) -> None:  # noqa: D102
        self._proposed = None

    def replicated(self) -> dict[str, Tensor]:  # noqa: D102
        if not self.size:
            return {}
        return {**self._keys._asdict(), "num_written": torch.tensor([self._num_written])}

    def restore(self, replicated: dict[str, Tensor], local: list[dict[str, Tensor]]) -> None:  # noqa: D102, ARG002
        if not replicated or not self.size:  # the checkpoint knew no queue: it begins empty
            return
        saved = Keys(replicated["image"], replicated["text"], replicated["ids"])
        num_written = int(replicated["num_written"])
        if len(saved.ids) == self.size:
            for mine, theirs in zip(self._keys, saved, strict=True):
                mine.copy_(theirs)
            self._num_written = num_written
            return
        first = num_written - min(num_written, len(saved.ids))  # of another size: what it held, oldest first
        places = torch.arange(first, num_written) % len(saved.ids)
        self._num_written = 0
        self._write(Keys(*(tensor[places] for tensor in saved)))

    def _write(self, keys: Keys) -> None:
        if not self.size:
            return
        count = len(keys.ids)
        num_kept = min(count, self.size)
        last = self._num_written + count
        places = torch.arange(last - num_kept, last, device=self._keys.ids.device) % self.size
        for mine, theirs in zip(self._keys, keys, strict=True):
            mine.index_copy_(0, places, theirs[count - num_kept :].to(mine))
        self._num_written = last


@PROVIDERS.register("queue")
class Queue(Provider):
    """The teacher's embeddings of past steps as further negatives (MoCo: He et al., 2020; both modalities: ALBEF).

    An image is compared with the `size` last texts as the teacher embedded them, a text with the `size` last images,
    except those of its own sample. Keys carry no gradient. The teacher is an average of the weights (`teacher.decay`).
    The queue begins empty and is filled by the steps from `start_step` on. It costs 8 `size` dim bytes on every rank.
    """

    size: int = Field(default=65536, gt=0, le=2**26, description="embeddings of each modality that are remembered")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), teacher_outputs=frozenset(self.between))

    def start(self, facts: RunFacts) -> TermState:  # noqa: D102
        return EmbeddingQueue(self.size, facts)

    def negatives(self, step: PairStep) -> ExtraNegatives | None:  # noqa: D102
        queue, pairs = step.state, step.pairs
        assert isinstance(queue, EmbeddingQueue)
        queue.propose(teacher_keys(step, all_ranks(pairs)))
        past = queue.keys
        if not len(past.ids):
            return None
        columns = dict(zip(self.between, (past.image.to(pairs.x), past.text.to(pairs.y)), strict=True))
        return SharedNegatives(pairs, columns, (past.ids,))


def teacher_keys(step: PairStep, ranks: RowGroup) -> Keys:
    """The teacher's embeddings of the rows of `ranks`, in the order of the global batch. Collective."""
    pairs = step.pairs
    both = torch.cat([step.teacher_rows(pairs.x_rows), step.teacher_rows(pairs.y_rows)], dim=1)
    x, y = ranks.gather_constant(both).chunk(2, dim=1)
    return Keys(x, y, pairs.all_ids if ranks is pairs.ranks else ranks.gather_constant(pairs.ids))


def all_ranks(pairs: Pairs) -> RowGroup:
    """All ranks, those of other groups of negatives too. Collective."""
    world = pairs.exchange.world
    if pairs.ranks.size == world.size:
        return pairs.ranks
    counts = torch.zeros(world.size, dtype=torch.int64, device=pairs.ids.device)
    counts[world.rank] = len(pairs.ids)
    return RowGroup(None, world.rank, tuple(world.sum(counts).tolist()))
