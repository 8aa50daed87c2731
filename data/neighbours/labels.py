"""The cluster of each sample of shards, and its group of neighbours: a folder of parts that a data order can trust."""

from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from data.embeddings.embedded import What
from data.embeddings.parts import PartRecord, PartsFolder, PartsKind, PartsManifest, no_part, rows_of

FORMAT: Final = "vlm-neighbours-1"
NONE: Final = -1
MOST_CLUSTERS: Final = 2**31 - 1
"""Labels are 32 bits wide, over all stages."""


class NeighboursManifest(PartsManifest):
    """What a folder of neighbours is of: embeddings of one kind by one model, their clusters, and groups if any.

    A cluster's number is that of the previous stage times `clusters` plus that of this one. `previous` is the identity
    of the labels of the stage before.
    """

    model: str
    on: What
    seed: int
    clusters: int = Field(ge=1, le=MOST_CLUSTERS)
    stages: int = Field(default=1, ge=1)
    num_clusters: int = Field(ge=1, le=MOST_CLUSTERS)
    previous: str = ""
    group_size: int | None = Field(default=None, ge=2)
    num_groups: int = Field(default=0, ge=0, le=MOST_CLUSTERS)


NEIGHBOURS: Final = PartsKind("neighbours.json", NeighboursManifest, FORMAT, "`vlm data cluster`")


class Labels(NamedTuple):
    """The cluster and the group of each row of a shard's index, `NONE` where it has none; `groups` where asked for."""

    clusters: NDArray[np.int32]
    groups: NDArray[np.int32] | None


def label_columns(
    rows: NDArray[np.int32], clusters: NDArray[np.int32], groups: NDArray[np.int32] | None
) -> dict[str, pa.Array]:
    """The columns of a part: row, cluster, and the group where there are any."""
    columns = {"row": pa.array(rows), "cluster": pa.array(clusters)}
    return columns if groups is None else {**columns, "group": pa.array(groups)}


def read_labels(folder: PartsFolder[NeighboursManifest], record: PartRecord, *, groups: bool) -> Labels:
    """The labels of all rows of a shard. Raises UserError where the part is damaged, or has others."""
    manifest = folder.manifest
    table = folder.read(record, ["row", "cluster", *(["group"] if groups else [])])
    rows = rows_of(folder, record, table)
    limits = {"cluster": manifest.num_clusters, "group": manifest.num_groups}
    found = {}
    for name in table.column_names[1:]:
        column = table[name]
        if not pa.types.is_int32(column.type) or column.null_count:
            raise no_part(folder, record)
        values = column.to_numpy()
        if len(values) and not 0 <= values.min() <= values.max() < limits[name]:
            raise no_part(folder, record)
        found[name] = np.full(record.num_rows, NONE, np.int32)
        found[name][rows] = values
    return Labels(found["cluster"], found.get("group"))
