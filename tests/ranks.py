"""Real gloo ranks on this machine: run a function in each, with a limit on how long a hang may last."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

# The server imports the heavy packages once; each rank is forked from it with them in place.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.rank_preload"])
TIMEOUT_SECONDS = 240.0


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT_SECONDS, group: bool = True
) -> list[Any]:
    """The results of `function(*args)` on each of `world_size` ranks, in rank order.

    With `group`, the default process group is up; without, only the launcher's variables are set. An exception in any
    rank, or a rank that is not done in time, fails the caller.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=_work, args=(sender, rank, world_size, port, group, function, args), daemon=False
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, timeout)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def free_port() -> int:
    """A TCP port on the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=timeout)
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise TimeoutError(f"ranks {missing} were not done after {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                failure, results[rank] = pickle.loads(pipes[rank].recv_bytes())  # noqa: S301
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if failure is not None:
                if isinstance(results[rank], Exception):
                    results[rank].add_note(f"in rank {rank}:\n{failure}")
                    raise results[rank]
                raise RuntimeError(f"rank {rank} failed:\n{failure}")
    return [results[rank] for rank in range(len(pipes))]


def _work(
    sender: Connection, rank: int, world_size: int, port: int, group: bool, function: Callable[..., Any], args: Any
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        if group:
            dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        result = function(*args)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        answer: tuple[str | None, Any] = (None, result)
    except BaseException as error:
        from vlm.errors import UserError

        answer = (traceback.format_exc(), error if isinstance(error, UserError) else None)
    # Plain pickling: tensors travel by value, and outlive the rank that made them.
    sender.send_bytes(pickle.dumps(answer))
