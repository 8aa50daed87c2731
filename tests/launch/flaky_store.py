"""A store in memory that fails as it is told to: by fsspec, under flaky://."""

from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FlakyStore(MemoryFileSystem):  # type: ignore[misc]
    """Loses connections and cuts what it stores, as often as it is told to; remembers in which order it stored."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[list[str]] = []
    stored: ClassVar[list[str]] = []

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        failure = self.failures.pop(0) if self.failures else ""
        if failure == "lost":
            raise ConnectionResetError("the connection was lost")
        if failure == "refused":
            raise PermissionError("no")
        super().put_file(lpath, rpath, **options)
        if failure == "cut":
            self.pipe_file(rpath, Path(lpath).read_bytes()[:-7])
        self.stored.append(rpath.rpartition("/")[2])

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        super().pipe_file(path, value, **options)
        self.stored.append(path.rpartition("/")[2])


def fresh_store() -> type[FlakyStore]:
    """The store, empty and without failures to come."""
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    FlakyStore.store.clear()
    FlakyStore.failures.clear()
    FlakyStore.stored.clear()
    return FlakyStore
