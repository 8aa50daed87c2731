"""Shards as webdataset reads them."""

from pathlib import Path

from webdataset.tariterators import group_by_keys, tar_file_expander


def read_by_webdataset(path: Path) -> list[dict[str, bytes | str]]:
    """The samples of a tar: `__key__`, and the members by suffix."""
    with path.open("rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    return [{name: part for name, part in one.items() if name not in ("__url__", "__local_path__")} for one in samples]
