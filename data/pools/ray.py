"""Work shared among the nodes of a Ray cluster."""

import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from data.pools.base import Job, Pool, PoolOptions, Result
from data.pools.remote import MOST_LOSSES, environment, lost_too_often, work_in
from vlm.errors import UserError, reason

_ANSWER_WITHIN = 10.0  # seconds


class RayPool(Pool):
    """One task a job, on a core each of a Ray cluster; a job whose worker or node is lost is done again elsewhere.

    `workers` is the most tasks at a time (default: as many as there are cores, also those that join later). With `gpu`
    each task has a GPU of its own, where the cluster has any. All nodes need the same files under the same paths.
    """

    def __init__(self, address: str | None, workers: int | None = None, *, gpu: bool = False) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError("--on ray: the package ray is not installed; pip install 'vlm[ray]'") from error
        self._ray: Any = ray
        self._workers = workers
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _connect(self._ray, address)
        self._gpus = 1 if gpu and self._ray.cluster_resources().get("GPU") else 0
        self._task: Any = self._ray.remote(num_cpus=1, num_gpus=self._gpus, max_retries=MOST_LOSSES - 1)(work_in)

    @classmethod
    def start(cls, options: PoolOptions) -> "RayPool":
        """As of any pool."""
        return cls(options.address, options.workers, gpu=options.gpu)

    def close(self) -> None:
        """As of any pool; the cluster stays."""
        if self._is_ours:
            self._ray.shutdown()

    def num_workers(self) -> int:
        """The tasks that the cluster can run at a time now."""
        if self._workers is not None:
            return self._workers
        return max(1, int(self._ray.cluster_resources().get("GPU" if self._gpus else "CPU", 1)))

    def submit(self, work: Callable[[Job], Result], job: Job) -> "Future[Result]":
        """As of any pool."""
        result: Future[Result] = Future()

        def end(done: "Future[Result]") -> None:
            error = done.exception()
            if error is None:
                result.set_result(done.result())
            else:
                result.set_exception(self._own(error))

        self._task.remote(os.getcwd(), work, job).future().add_done_callback(end)
        return result

    def _num_ahead(self) -> int:
        """What a limit leaves room for: Ray itself knows none, and runs all that it is given."""
        return super()._num_ahead() if self._workers is None else self._workers

    def _own(self, error: BaseException) -> BaseException:
        """The exception that the work raised, out of Ray's; what Ray itself says is made one line."""
        exceptions = self._ray.exceptions
        if isinstance(error, exceptions.RayTaskError):
            cause: BaseException = error.cause
            return cause
        if isinstance(error, exceptions.WorkerCrashedError | exceptions.NodeDiedError | exceptions.OutOfMemoryError):
            return lost_too_often(reason(error))
        return UserError(f"--on ray: {reason(error)}")


def _connect(ray: Any, address: str | None) -> None:
    """Join the cluster. Raises UserError where there is none: Ray itself goes on asking a closed port for minutes."""
    on_termination = signal.getsignal(signal.SIGTERM)
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        if plain := re.fullmatch(r"(?:ray://)?([^/]+):(\d{1,5})", where):
            socket.create_connection((plain[1], int(plain[2])), timeout=_ANSWER_WITHIN).close()
        ray.init(
            address=where,
            runtime_env={"env_vars": environment()},
            log_to_driver=False,
            logging_level="error",
        )
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--on ray: no cluster at {where} ({reason(error)}); `ray start --head` starts one, "
            "--ray-address or RAY_ADDRESS names another"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_termination)  # Ray's own handler would end the command with another code
