"""The labels that a recipe's sources are batched by: read, compared with what the shards hold, and named."""

from typing import NamedTuple

import numpy as np

from data.embeddings.parts import open_parts, parts_identity
from data.neighbours.config import NeighboursConfig
from data.neighbours.labels import NEIGHBOURS, NONE, read_labels
from data.order.neighbours import NeighbourLine, Neighbours
from data.order.order import Order
from data.shards.source import Source
from data.source_names import recipe_key
from vlm.errors import UserError
from vlm.paths import local_path


class SourceNeighbours(NamedTuple):
    """The labels of a source, and their identity: of what they say, wherever they lie."""

    neighbours: Neighbours
    identity: str


def read_neighbours(source: Source, config: NeighboursConfig) -> SourceNeighbours:
    """The labels of a source's samples. Raises UserError where they are of other samples, or there are none."""
    where = f"{recipe_key(source.name)}.neighbours"
    folder = open_parts(local_path(config.labels, f"{where}.labels"), NEIGHBOURS, f"{where}.labels")
    by_group = config.by == "group"
    if by_group and folder.manifest.group_size is None:
        raise UserError(f"{where}.by: {folder.folder} has clusters alone; `vlm data cluster --groups` makes groups")
    records = folder.of_shards(source.contents, f"{where}.labels")
    clusters = np.full(source.num_samples, NONE, np.int32)
    groups = np.full(source.num_samples if by_group else 0, NONE, np.int32)
    stop = 0
    for record, count in zip(records, source.counts.tolist(), strict=True):
        start, stop = stop, stop + count
        found = read_labels(folder, record, groups=by_group)
        for into, labels in ((clusters, found.clusters), (groups, found.groups)):
            if labels is not None:
                known = min(count, len(labels))  # of samples of texts alone, one side may not know
                into[start : start + known] = labels[:known]
    identity = f"{config.by} {parts_identity(records)[:16]}"
    if not by_group:
        return SourceNeighbours(Neighbours(clusters), identity)
    return SourceNeighbours(Neighbours(groups, folder.manifest.group_size, clusters), identity)


def require_batches(order: Order) -> None:
    """Refuse neighbours of which no batch can be made. Raises UserError."""
    for number, line in enumerate(order.lines):
        if not isinstance(line, NeighbourLine):
            continue
        where, size = f"{recipe_key(line.name)}.neighbours", line.group_size
        alone = len(order.lines) == 1
        if size is not None and alone and order.global_batch % size:
            raise UserError(f"{where}: groups of {size} do not divide the global batch of {order.global_batch}")
        if size is not None and size > line.batch:
            raise UserError(f"{where}: groups of {size} are larger than the {line.batch} samples that a batch takes")
        if not line.num_blocks:
            what = "the largest cluster has" if size is None else "all full groups together have"
            raise UserError(
                f"{where}: {what} {line.largest:,} samples, fewer than the {order.mix.most_in_a_batch(number):,} that "
                "a batch takes"
            )


def neighbour_notices(order: Order) -> tuple[str, ...]:
    """Lines on samples that never come: without a label, or of a cluster that fills no batch."""
    notices = []
    for line in order.lines:
        if isinstance(line, NeighbourLine) and line.num_reached < (total := int(line.counts.sum())):
            small = "in a group that is not full" if line.group_size else f"in clusters of fewer than {line.batch}"
            notices.append(
                f"{recipe_key(line.name)}.neighbours: {total - line.num_reached:,} of {total:,} samples never come: "
                f"without a label, or {small}"
            )
    return tuple(notices)
