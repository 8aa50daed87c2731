"""Indexing what was written: each shard when it is complete, and the folder at the end.

In a build the process that hands out the work does it, in a fraction of a millisecond a sample: the tokenizer that
counts the captions' tokens brings half a gigabyte of libraries along, which the processes that write shards can do
without.
"""

from collections.abc import Sequence
from pathlib import Path


def index_shard(path: Path, where: str) -> None:
    """Write the sidecar of a complete shard; `where` begins messages."""
    from data.shards.cache import ShardCache
    from data.shards.indexing import Indexer

    Indexer(ShardCache(), where)(str(path))


def index_folder(shards: Sequence[Path], where: str) -> None:
    """Write the manifests of the shards' folders, from their sidecars."""
    from data.shards.cache import ShardCache
    from data.shards.folder_index import FolderIndex

    if shards:
        FolderIndex(ShardCache(), where).load_or_build([str(path) for path in shards])
