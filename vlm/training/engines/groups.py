"""Groups of ranks that share a whole copy of the weights: all of them, those of a node, or so many."""

import os
import socket
from collections import Counter
from itertools import pairwise

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.training.engines.options import ShardGroup

_KEY = "engine_options.shard_group"
SHARD, REPLICATE = "shard", "replicate"


def shard_mesh(world: World, group: ShardGroup) -> DeviceMesh:
    """The ranks in a line, over which weights are sharded, or in a table, a line for each group. Collective.

    Groups are of consecutive ranks. Raises EveryRankError for a size that does not divide the world, and for nodes with
    unequal numbers of ranks.
    """
    size = world.size if group == "all" else ranks_of_a_node(world) if group == "node" else group
    if world.size % size:
        sizes = [str(number) for number in range(2, world.size) if world.size % number == 0]
        raise EveryRankError(
            f"{_KEY}: found {size}, which does not divide the run's {world.size} ranks; choose from: "
            f"{', '.join(['all', *sizes])}"
        )
    device = world.device.type
    if size == world.size:
        return init_device_mesh(device, (size,), mesh_dim_names=(SHARD,))
    return init_device_mesh(device, (world.size // size, size), mesh_dim_names=(REPLICATE, SHARD))


def ranks_of_a_node(world: World) -> int:
    """How many ranks each node has, by the launcher or else by the names of the machines. Collective."""
    told = world.gather_objects((os.environ.get("LOCAL_WORLD_SIZE"), socket.gethostname()))
    if all(size for size, _ in told):
        numbers = {int(size) for size, _ in told}
    else:
        names = [name for _, name in told]
        numbers = set(Counter(names).values())
        changes = sum(before != after for before, after in pairwise(names))
        if changes + 1 != len(set(names)):
            raise EveryRankError(f"{_KEY}: the ranks of a node are not numbered in a row; say a number, or all")
    if len(numbers) > 1:
        raise EveryRankError(f"{_KEY}: nodes have {min(numbers)} to {max(numbers)} ranks; say a number, or all")
    return numbers.pop()
