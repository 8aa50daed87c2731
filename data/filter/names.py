"""Names of the filtered copies of shards: as the shard itself, seen from the folder that holds them all."""

import os
from collections.abc import Sequence

from data.shards.store import is_command, is_remote, local_path, without_query
from vlm.errors import UserError
from vlm.paths import local_path as path_of_user

_ENDINGS = (".tar.gz", ".tgz", ".tar")


def output_names(shards: Sequence[str]) -> dict[str, str]:
    """The path of each shard's copy below the folder of the output; a gzipped shard's copy is a plain tar.

    Raises:
        UserError: two shards would get one name, or there is no shard.
    """
    if not shards:
        raise UserError("SHARDS: no shards are named")
    full_names = {shard: shard if is_remote(shard) else os.path.abspath(local_path(shard)) for shard in shards}
    folders = [name.split("/")[:-1] for name in full_names.values()]
    common = _shared(folders)
    names: dict[str, str] = {}
    for number, (shard, name) in enumerate(full_names.items()):
        # Two slashes in a row (https://host//a.tar) would make the rest an absolute path.
        folders_and_name = list(filter(None, without_query(name).split("/")[common:]))
        if ".." in folders_and_name:
            raise UserError(f"SHARDS: {shard} would be written outside the output's folder; write it without ..")
        names[shard] = f"{number:06d}.tar" if is_command(name) else _as_tar("/".join(folders_and_name))
        path_of_user(names[shard], "SHARDS")  # refused now, and not after hours, when its copy is to be written
    shard_of: dict[str, str] = {}
    for shard, name in names.items():
        if name in shard_of:
            raise UserError(f"SHARDS: {shard_of[name]} and {shard} would both be written as {name}; take one at a time")
        shard_of[name] = shard
    return names


def _shared(folders: list[list[str]]) -> int:
    """The number of leading folders that all of them share."""
    first, last = min(folders), max(folders)
    differ = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return next(differ, min(len(first), len(last)))


def _as_tar(name: str) -> str:
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), "")
    return name.removesuffix(ending) + ".tar"
