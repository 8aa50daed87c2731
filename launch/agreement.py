"""Agreement of the ranks of a run before it begins: on recipe, options, and the data that they see."""

from collections.abc import Mapping

from launch.recipe import Recipe, keys_that_differ
from vlm.checkpoint.data_record import DataRecord
from vlm.distributed.world import World
from vlm.errors import EveryRankError

_SHOWN = 3


def require_same_start(world: World, recipe: Recipe, options: Mapping[str, str | bool | None]) -> None:
    """Compare what each rank was started with; where its data lies, and how it is read, may differ. Collective.

    Raises:
        EveryRankError: a rank has another recipe (another copy of the file, other overrides) or other options.
    """
    mine = {**recipe.model_dump(mode="json"), **options}
    first, *others = world.gather_objects(mine)
    for rank, other in enumerate(others, start=1):
        keys = keys_that_differ(first, other)
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            raise EveryRankError(
                f"rank {rank} was started with other values than rank 0 of {', '.join(keys[:_SHOWN])}{more}; "
                "all ranks need the same recipe and options"
            )


def require_same_view(world: World, records: Mapping[str, DataRecord]) -> None:
    """Compare the data that the ranks see under each key, where each machine has a copy of its own. Collective.

    Raises:
        EveryRankError: a rank sees other data than rank 0.
    """
    first, *others = world.gather_objects(dict(records))
    for rank, other in enumerate(others, start=1):
        for key, record in first.items():
            if _is_other(record, other[key]):
                raise EveryRankError(
                    f"{key}: rank {rank} sees {other[key].samples:,} samples in {other[key].shards} shards, rank 0 "
                    f"sees {record.samples:,} in {record.shards}, and not the same: every machine needs the same data"
                )


def _is_other(first: DataRecord, other: DataRecord) -> bool:
    """Whether two ranks see different samples; without an index, nothing tells but their number."""
    known = bool(first.content and other.content)
    return first.samples != other.samples or (known and first != other)
