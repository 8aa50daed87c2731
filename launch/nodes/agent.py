"""One node's agent: torchrun's own, which also says what it does and knows when to stop starting ranks again."""

import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, get_args_parser

from launch.nodes.job import Nodes
from launch.nodes.restarts import Restarts, Verdict
from vlm.ends.end import FAILURE, StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# What ranks understand as a wish to save and stop; of a terminal that is gone they know nothing.
_PASSED_ON = {signal.SIGHUP: signal.SIGTERM}
_AGAIN_SECONDS, _PATIENT_SECONDS = 1.0, 5.0

Say = Callable[[str], None]


class NodeAgent(LocalElasticAgent):
    """Starts and watches this node's ranks; `restarts` judges their ends, `say` tells of them in one line each."""

    def __init__(
        self, spec: WorkerSpec, logs: DefaultLogsSpecs, grace: int, restarts: Restarts, nodes: Nodes, say: Say
    ) -> None:
        super().__init__(spec, logs, shutdown_timeout=grace)
        self._grace = grace
        self._restarts = restarts
        self._nodes = nodes
        self._say = say
        self._num_nodes: int | None = None
        self.last_verdict: Verdict | None = None

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        self._restarts.begin()
        before, self._num_nodes = self._num_nodes, int(worker_group.group_world_size or 1)
        is_first = worker_group.group_rank == 0
        if is_first and (self._num_nodes < self._nodes.most or before not in (None, self._num_nodes)):
            ranks = self._num_nodes * worker_group.spec.local_world_size
            self._say(
                f"{'begins' if before is None else 'goes on'} with {self._num_nodes} of {self._nodes.most} nodes, "
                f"{ranks} rank{'' if ranks == 1 else 's'} (--nodes {self._nodes})"
            )

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._judge([failure.exitcode for failure in result.failures.values()])
        return result

    def _judge(self, codes: Sequence[int]) -> None:
        """Say what follows from an end; where nothing does, the agent is left no restart."""
        verdict = self._restarts.verdict(codes)
        most = self._worker_group.spec.max_restarts
        if verdict.goes_on and self._remaining_restarts == 0:
            verdict = Verdict(False, f"started again {most} times (--max-restarts): {verdict.words}", FAILURE)
        self.last_verdict = verdict
        if verdict.goes_on:
            number = most - self._remaining_restarts + 1
            self._say(f"starts its ranks again, from the newest checkpoint ({number} of {most}): {verdict.words}")
        else:
            self._remaining_restarts = 0

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # noqa: ARG002
        self._shutdown(timeout=self._grace)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        super()._shutdown(_PASSED_ON.get(death_sig, death_sig), timeout)


def run_node(
    torchrun: Callable[[], Sequence[str]], nodes: Nodes, restarts: Restarts, join_seconds: float, say: Say
) -> int:
    """Run this node's part of a job by the words of a `torchrun` command to its end; the exit code.

    A meeting point that is gone is looked for again, for `join_seconds`: it comes back with its node, or with the link.

    Raises:
        StoppedError: a signal asked for it; the ranks were told, and have ended.
    """
    with _quiet(), _signals_raised(), tempfile.TemporaryDirectory(prefix="vlm-launch-") as logs:
        missed_since, is_told = None, False
        while True:
            began = time.monotonic()
            try:
                return _run_agent(*_parsed(torchrun()), logs, nodes, restarts, say)
            except SignalException as error:
                raise StoppedError(error.sigval) from None
            except (RendezvousConnectionError, DistError) as error:
                now = time.monotonic()
                if missed_since is None or began - missed_since > join_seconds:
                    missed_since, is_told = began, False
                if now - missed_since > _PATIENT_SECONDS and not is_told:
                    is_told = True
                    say("the meeting point cannot be reached; it is looked for again")
                if now - missed_since > join_seconds:
                    say(f"the meeting point was not reached within {join_seconds:.0f} s ({type(error).__name__})")
                    return FAILURE
                _sleep(_AGAIN_SECONDS)
            except RendezvousError as error:
                say(_rendezvous_words(error))
                return FAILURE


def _run_agent(
    config: LaunchConfig, program: str, arguments: list[str], logs: str, nodes: Nodes, restarts: Restarts, say: Say
) -> int:
    """One life of an agent: its exit code, once the run is done or is given up on all nodes."""
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=config.nproc_per_node,
        entrypoint=program,
        args=tuple(arguments),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
    )
    agent = NodeAgent(spec, DefaultLogsSpecs(log_dir=logs), int(config.shutdown_timeout or 30), restarts, nodes, say)
    result: RunResult | None = agent.run()
    spec.rdzv_handler.shutdown()  # whoever still waits for others is not to wait any longer
    if result is None or not result.is_failed():
        return 0
    verdict = agent.last_verdict or Verdict(False, "its ranks failed")
    say(f"stops: {verdict.words}")
    return verdict.code


def _parsed(torchrun: Sequence[str]) -> tuple[LaunchConfig, str, list[str]]:
    """The configuration of a `torchrun` command by its own parser, and the command of a rank."""
    config, program, arguments = config_from_args(get_args_parser().parse_args(list(torchrun)[1:]))
    assert isinstance(program, str)
    return config, program, arguments


def _rendezvous_words(error: RendezvousError) -> str:
    kind = type(error).__name__
    if kind == "RendezvousClosedError":
        return "the run has ended on the other nodes, whose lines say how"
    if kind == "RendezvousTimeoutError":
        return "too few nodes came in time: were all started, with the same --nodes, --name and --meet?"
    return f"the nodes did not meet: {kind}"


def _sleep(seconds: float) -> None:
    try:
        time.sleep(seconds)
    except SignalException as error:
        raise StoppedError(error.sigval) from None


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Raise SignalException at a signal in the block, from the first moment on; the agent does so with ranks only."""

    def raise_signal(number: int, frame: Any) -> None:  # noqa: ARG001 - Python's signature
        raise SignalException(f"signal {number}", signal.Signals(number))

    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in SIGNALS)
    before = {number: signal.signal(number, raise_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the agent's own log to itself, unless LOGLEVEL asks for it: what it does is told in lines."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]
    loggers = [] if os.environ.get("LOGLEVEL") else [logging.getLogger(name) for name in names]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
