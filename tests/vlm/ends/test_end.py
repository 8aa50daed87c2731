"""Each kind of exception is one line of its own and an exit code; nothing in it moves the cursor."""

import errno
import signal

import pytest

from vlm.ends.end import End, StoppedError, end_of, is_about_connection
from vlm.ends.teller import Teller
from vlm.errors import EveryRankError, UserError


@pytest.mark.parametrize(
    ("error", "kind", "code", "line"),
    [
        (UserError("data.root: no\nsuch \x1b[1mfolder"), "user", 2, r"data.root: no such \x1b[1mfolder"),
        (EveryRankError("alike"), "user", 2, "alike"),
        (ZeroDivisionError("division by zero"), "failure", 1, "ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), "signal", 130, "stopped by SIGINT"),
        (StoppedError(signal.SIGTERM, "step 3 is saved"), "signal", 143, "stopped by SIGTERM: step 3 is saved"),
        (StoppedError(signal.SIGUSR1), "signal", 143, "stopped by SIGUSR1"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/a/metrics.jsonl"),
            "user",
            2,
            "/runs/a/metrics.jsonl: No space left on device: make room, then start the same command again",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 999), "user", 2, f"{'x' * 200}: File name too long"),
        (OSError(errno.EACCES, "Permission denied", "/a/b"), "user", 2, "/a/b: Permission denied"),
        (MemoryError(), "failure", 1, "out of memory (MemoryError); a smaller micro_batch needs less"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "failure",
            1,
            "out of memory (tried to allocate 16.00 GiB); a smaller micro_batch needs less",
        ),
    ],
)
def test_an_exception_is_one_line_and_a_code(error: BaseException, kind: str, code: int, line: str) -> None:
    end = end_of(error)
    assert (end.kind, end.code, end.message) == (kind, code, line)
    assert end.everywhere is isinstance(error, EveryRankError)


def test_an_unforeseen_exception_says_where_it_was_raised() -> None:
    try:
        raise KeyError("nothing")
    except KeyError as error:
        message = end_of(error).message
    assert message.startswith("KeyError: 'nothing' (test_end.py:")


def test_ranks_that_did_not_meet_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    end = end_of(RuntimeError("Timed out after 61 seconds waiting for clients. 3/4 clients joined."))
    assert end == End("failure", end.message, 1)
    assert end.message.startswith("3 of 4 ranks came to node-1:29500 (MASTER_ADDR, MASTER_PORT) in time")


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7"), True),
        (ConnectionResetError("Connection reset by peer"), True),
        (RuntimeError("shapes differ"), False),
        (UserError("Connection closed by peer"), False),
    ],
)
def test_what_may_be_the_echo_of_another_end(error: BaseException, is_it: bool) -> None:
    assert is_about_connection(error) is is_it


@pytest.mark.parametrize(("local", "met", "is_told"), [("0", False, True), ("1", False, False), ("0", True, False)])
def test_a_mistake_that_all_ranks_of_a_node_find_is_told_there_until_the_ranks_have_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local: str, met: bool, is_told: bool
) -> None:
    """A recipe that is broken on the second machine alone: rank 0 knows nothing of it, and waits."""
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", local)
    teller = Teller()
    if met:
        teller.set_rank(8)
    assert teller.report(end_of(EveryRankError("recipe.yaml: seed: found None")))
    assert capsys.readouterr().err == ("vlm: rank 8: recipe.yaml: seed: found None\n" if is_told else "")
