"""The watch sees what the main thread cannot: signals that come while it hangs, and the end that nobody told."""

import signal
import subprocess
import sys

import pytest

from vlm.ends.end import StoppedError
from vlm.ends.watch import Watch

HANG = """
import os, signal, sys, threading, time
from vlm.ends.watch import Watch
with Watch() as watch:
    watch.lost_now = lambda: "; what came after step 7 is lost"
    with watch.keeping_requests():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep({pause})
        assert watch.request == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep({pause})
print("went on")
"""


def ends(program: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_second_signal_ends_at_once_and_says_what_is_lost() -> None:
    code, said, told = ends(HANG.format(pause=1.2))
    assert (code, said) == (130, "")
    assert told == "vlm: stopped by SIGINT: at once, at the second signal; what came after step 7 is lost\n"


def test_one_interrupt_that_arrives_twice_is_one() -> None:
    """A terminal and a launcher both pass it on. It is kept, and ends the block that kept it."""
    code, said, told = ends(HANG.format(pause=0.01))
    assert (code, said) == (1, "")
    assert "StoppedError" in told.splitlines()[-1]


def test_a_signal_raises_in_the_main_thread_and_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(StoppedError) as caught, Watch():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_first_signal_that_the_main_thread_cannot_hear_ends_it_all_the_same() -> None:
    """As in a rendezvous: the main thread waits in C, where no handler of Python's runs."""
    program = """
import ctypes, os, signal, threading
from vlm.ends.watch import Watch
with Watch():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex), lock(mutex)
"""
    code, _, told = ends(program)
    assert code == 143
    assert told == "vlm: stopped by SIGTERM\n"
