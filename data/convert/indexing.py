"""Indexing what was built: each shard when it is complete, and the folder at the end.

The process that hands out the work does it, in a fraction of a millisecond a sample: the tokenizer that counts the
captions' tokens brings half a gigabyte of libraries along, which the processes that write shards can do without.
"""

from collections.abc import Sequence
from pathlib import Path

_WHERE = "vlm data build"


def index_shard(path: Path) -> None:
    """Write the sidecar of a complete shard."""
    from data.shards.cache import ShardCache
    from data.shards.indexing import Indexer

    Indexer(ShardCache(), _WHERE)(str(path))


def index_folder(shards: Sequence[Path]) -> None:
    """Write the manifest of the folder, from the shards' sidecars."""
    from data.shards.cache import ShardCache
    from data.shards.folder_index import FolderIndex

    if shards:
        FolderIndex(ShardCache(), _WHERE).load_or_build([str(path) for path in shards])
