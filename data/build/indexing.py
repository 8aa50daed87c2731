"""Indexing what was built: each shard when it is complete, and the folder at the end."""

from collections.abc import Sequence
from pathlib import Path

_WHERE = "vlm data build"


def index_shard(path: Path) -> None:
    """Write the sidecar of a complete shard; indexing later would cost a second reading."""
    from data.shards.cache import ShardCache  # pulls in torch, which a process that only sets images aside can spare
    from data.shards.indexing import Indexer

    Indexer(ShardCache(), _WHERE)(str(path))


def index_folder(shards: Sequence[Path]) -> None:
    """Write the manifest of the folder, from the shards' sidecars."""
    from data.shards.cache import ShardCache
    from data.shards.folder_index import FolderIndex

    if shards:
        FolderIndex(ShardCache(), _WHERE).know([str(path) for path in shards])
