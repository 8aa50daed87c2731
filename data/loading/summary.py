"""Summary of a run's data at its start: its sources, and how they go together with the global batch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from data.order.order import Order
from data.shards.source import Source
from vlm.checkpoint.data_record import DataRecord


@dataclass(frozen=True)
class SourceSummary:
    """A source in a run's record; `fraction` is the exact share of the samples in any 1,000 batches.

    `content` is what `Source.content` says; where nothing was indexed it is empty. `neighbours` is the identity of its
    labels where batches are of neighbours.
    """

    name: str
    shards: tuple[str, ...]
    num_samples: int
    fraction: float
    content: tuple[str, ...] = ()
    neighbours: str = ""

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return len(self.shards)

    @property
    def record(self) -> DataRecord:
        """The identity of the source's data, for checkpoints."""
        return DataRecord(
            samples=self.num_samples, shards=self.num_shards, content=self.content, neighbours=self.neighbours
        )


def summarised(
    sources: Sequence[Source], order: Order, neighbours: Mapping[str, str] = MappingProxyType({})
) -> tuple[SourceSummary, ...]:
    """The summaries of the sources of an order; `neighbours` are the identities of labels by source."""
    shares = [count / order.mix.period for count in order.mix.counts]
    return tuple(
        SourceSummary(one.name, one.shards, one.num_samples, share, one.content, neighbours.get(one.name, ""))
        for one, share in zip(sources, shares, strict=True)
    )


def batch_notices(sources: Iterable[SourceSummary], global_batch: int) -> tuple[str, ...]:
    """Lines on batches whose pairs are negatives of themselves, or have none."""
    if global_batch == 1:
        return ("global_batch: a batch of 1 pair has no negatives: losses that compare pairs are always 0",)
    return tuple(
        f"global_batch: {source.fraction * global_batch:,.0f} of its {global_batch:,} pairs come from {source.name}, "
        f"which has {source.num_samples:,}: samples come twice in a batch, and are negatives of themselves"
        for source in sources
        if source.fraction * global_batch > source.num_samples
    )
