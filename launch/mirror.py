"""The copy of a run in a store: its complete checkpoints and its files, from which a run goes on whose folder is lost.

s3://bucket/run/
    recipe.yaml, metrics.jsonl, ...      as they were after the newest checkpoint, or later
    checkpoints/step-00000100/           as in the run; the manifest is stored last, and marks it as whole
"""

import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data.shards.remote import filesystem
from data.shards.retry import RetryConfig, retried
from data.shards.store import exists, list_remote, read_bytes, write_remote
from launch.checkpoint_copy import all_stored, fetch, send
from vlm.atomic import write_bytes
from vlm.checkpoint.folder import MANIFEST, complete_checkpoints, step_of
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.manifest import NewerCheckpointError
from vlm.errors import UserError, reason
from vlm.training.run_files import CHECKPOINTS, RECIPE

_FILES = re.compile(r"(recipe\.yaml|run\.json|[a-z]+\.jsonl|report\.html|(samples|substitutions)/\w[\w.-]*)")
_PROBE = ".vlm-probe"


class Mirror:
    """Copies the newest checkpoint of a run to a store in a thread, on rank 0. What fails is told, and costs no step.

    A checkpoint that is complete while another is copied waits; of several that wait, the newest is copied.
    """

    def __init__(self, run: Path, url: str, retry: RetryConfig, say: Callable[[str], None]) -> None:
        self._run = run
        self._url = url.rstrip("/")
        self._retry = retry
        self._say = say
        self._wanted = threading.Condition()
        self._step: int | None = None
        self._closes = False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def copy(self, step: int) -> None:
        """Have the checkpoint of `step` copied, and the run's files as they are then."""
        with self._wanted:
            self._step = step
            self._wanted.notify()

    def close(self) -> None:
        """Wait until what is asked for is copied, or could not be."""
        with self._wanted:
            self._closes = True
            self._wanted.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._step is not None or self._closes)
                step, self._step = self._step, None
            if step is None:
                return
            try:
                self._copy(step)
            except Exception as error:  # a store is no reason to end a run
                self._say(f"step {step}: its checkpoint could not be copied to {self._url}: {reason(error)}")

    def _copy(self, step: int) -> None:
        folder = complete_checkpoints(self._run / CHECKPOINTS).get(step)
        if folder is None:  # pruned meanwhile
            return
        checkpoint = Checkpoint(folder)  # which nobody prunes as long as it is there
        for file in sorted(path for path in self._run.rglob("*") if path.is_file()):
            name = str(file.relative_to(self._run))
            if _FILES.fullmatch(name):
                write_remote(f"{self._url}/{name}", file.read_bytes(), self._retry)
        send(checkpoint, f"{self._url}/{CHECKPOINTS}", self._retry)
        checkpoint.release()


def fetch_run(url: str, run: Path, retry: RetryConfig) -> list[str]:
    """Bring the newest whole checkpoint of a mirror and its files into `run`, which holds no run; lines on it.

    The recipe comes last: before, the folder holds no run, and a start that was killed fetches again.

    Raises:
        UserError: the store cannot be read, or none that lies there is whole.
    """
    url = url.rstrip("/")
    try:
        fetched, lines = _newest_whole(url, run, retry)
        if fetched is None:
            return []
        names = [name for name in _stored_files(url, retry) if name != RECIPE]
        for name in (*names, RECIPE):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(run / name, read_bytes(f"{url}/{name}", retry))
    except OSError as error:
        raise UserError(f"sync: {error}") from None
    return [*lines, f"{run} is empty: its last checkpoint was fetched from {fetched}"]


def _newest_whole(url: str, run: Path, retry: RetryConfig) -> tuple[str | None, list[str]]:
    """Fetch the newest checkpoint that is as it was written; where it lay, and lines on those passed over."""
    passed_over: list[str] = []
    for one in all_stored(url, retry):
        try:
            fetch(one, run / CHECKPOINTS, retry)
        except NewerCheckpointError:
            raise
        except UserError as error:
            passed_over.append(f"{one} is passed over: {error}")
        else:
            return one, passed_over
    if passed_over:
        raise UserError(f"sync: no checkpoint below {url} is whole; {'; '.join(passed_over)}")
    return None, []


def _stored_files(url: str, retry: RetryConfig) -> list[str]:
    """The names of a run's files in a mirror: none but those that a run has."""
    patterns = [f"{url}/{pattern}" for pattern in ("*", "samples/*", "substitutions/*")]
    found = [one.removeprefix(f"{url}/") for pattern in patterns for one in list_remote(pattern, "sync", retry)]
    return [name for name in found if _FILES.fullmatch(name)]


def require_mirror(url: str, retry: RetryConfig, *, resuming: bool) -> None:
    """Ask a store before the work whether it can be written to.

    Raises:
        UserError: it cannot, or it holds a run that is not being resumed.
    """
    try:
        write_remote(f"{url.rstrip('/')}/{_PROBE}", b"", retry.for_first_contact())
        _remove(f"{url.rstrip('/')}/{_PROBE}", retry)
        if not resuming and exists(f"{url.rstrip('/')}/{RECIPE}", retry):
            raise UserError(f"sync: {url} already holds a run; go on with it by --resume auto, or choose another sync")
    except OSError as error:
        raise UserError(f"sync: {error}") from None


def leave_later(url: str, step: int, retry: RetryConfig) -> None:
    """Take their manifests from stored checkpoints beyond `step`: the run goes on from there another way.

    Raises:
        UserError: the store cannot be read or written.
    """
    try:
        for manifest in list_remote(f"{url.rstrip('/')}/{CHECKPOINTS}/step-*/{MANIFEST}", "sync", retry):
            if (step_of(Path(manifest).parent) or 0) > step:
                _remove(manifest, retry)
    except OSError as error:
        raise UserError(f"sync: {error}") from None


def _remove(url: str, retry: RetryConfig) -> None:
    def remove() -> None:
        store, path = filesystem(url, retry.silence)
        store.rm_file(path)

    with suppress(FileNotFoundError):
        retried(url, retry, remove, "removed")
