"""Samples of the slots of global batches, those that cannot be used replaced once for all lives of a run."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from data.loading.substitution import ShardRow, Substitution, SubstitutionLog, no_substitute, substitutes
from data.order.order import Order
from data.samples.bad_sample import BadSampleError
from data.shards.reader import ShardReader
from data.shards.source import Sample, Source
from data.shards.stamp import Stamp
from vlm.skip import Skip


@runtime_checkable
class Example(Protocol):
    """What a step is given of one sample."""

    @property
    def sample(self) -> Sample:
        """The sample itself."""


Read = TypeVar("Read", bound=Example)
ReadSample = Callable[[Source, ShardRow, int], Read]
"""Reads a sample of a source for a visit in an epoch; raises BadSampleError where it cannot be used."""


class Pick(NamedTuple):
    """The sample that the order has for one slot: the number of its source, that source's epoch, shard and row."""

    slot: int
    source: int
    epoch: int
    place: ShardRow


class SlotReader:
    """Reader of the samples in `slots` of global batches."""

    def __init__(
        self,
        sources: Sequence[Source],
        order: Order,
        slots: range,
        log: SubstitutionLog,
        seed: int,
        reader: ShardReader,
    ) -> None:
        self.sources = tuple(sources)
        self.order = order
        self.slots = slots
        self._log = log
        self._seed = seed
        self._reader = reader
        self._shard_numbers: dict[tuple[int, str], int] = {}

    def picks(self, step: int) -> Iterator[Pick]:
        """The samples of one step, slot by slot."""
        columns = (column.tolist() for column in self.order.picks(step, self.slots))
        for slot, source, epoch, shard, row in zip(self.slots, *columns, strict=True):
            yield Pick(slot, source, epoch, (shard, row))

    def status(self, step: int, pick: Pick) -> str:
        """A line on what is being read."""
        shard, row = pick.place
        return f"step {step}: {self.sources[pick.source].shards[shard]}, sample {row}"

    def read(self, step: int, pick: Pick, read: ReadSample[Read]) -> tuple[Read, Skip | None]:
        """The sample of a slot, or of its substitute, and then the record of what was skipped.

        Raises:
            UserError: the source has nothing usable left.
        """
        source, place = self.sources[pick.source], pick.place
        substitution = self._log.find(step, pick.slot)
        names = (source.shards[place[0]], source.stable_names[place[0]])
        if substitution is not None and not substitution.is_about(names, place[1]):
            substitution = None
        try:
            if substitution is None:
                return read(source, place, pick.epoch), None
            return read(source, self._place(pick.source, substitution), pick.epoch), substitution.skip
        except BadSampleError as error:
            reason = str(error) if substitution is None else substitution.skip.reason
        return self._substitute(step, pick, reason, read)

    def shards_ahead(self, step: int) -> dict[str, Stamp]:
        """The shards that these slots come to from `step` on, first needed first, in the state they were indexed in."""
        ahead = self.order.shards_ahead(step, self.slots)
        return {self.sources[source].shards[shard]: self.sources[source].stamp(shard) for source, shard in ahead}

    def discard_before(self, step: int) -> None:
        """Drop from memory what no step from `step` on can need."""
        self._log.discard_before(step)

    def _substitute(self, step: int, pick: Pick, reason: str, read: ReadSample[Read]) -> tuple[Read, Skip]:
        source, place, last, tried = self.sources[pick.source], pick.place, reason, 1
        for candidate in substitutes(self.order, self._seed, step, pick.slot):
            try:
                example = read(source, candidate, pick.epoch)
            except BadSampleError as error:
                last, tried = f"{source.shards[candidate[0]]}: {error}", tried + 1
                continue
            substitute = f"{example.sample.shard}:{example.sample.key}"
            skip = source.skip(place[0], source.key_or_row(*place, self._reader), reason, substitute)
            names = source.stable_names[candidate[0]], source.stable_names[place[0]]
            self._log.record(Substitution(step, pick.slot, place[1], names[0], candidate[1], skip, names[1]))
            return example, skip
        raise no_substitute(source.name, tried, last)

    def _place(self, number: int, substitution: Substitution) -> ShardRow:
        """The present shard and row of a substitute."""
        if not self._shard_numbers:
            self._shard_numbers = {
                (source, name): shard
                for source, one in enumerate(self.sources)
                for names in (one.shards, one.stable_names)
                for shard, name in enumerate(names)
            }
        shard = self._shard_numbers.get((number, substitution.shard))
        if shard is None:
            raise BadSampleError(f"its substitute's shard {substitution.shard} is no longer there")
        return shard, substitution.row
