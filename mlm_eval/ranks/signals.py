"""What signals do to this process: it ends, and leaves nothing unfinished beside its targets.

A process by itself cleans up by an exception, as after Ctrl-C. A rank is often inside a collective
or another C call, where Python's handlers do not run: a thread removes what it was writing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

from mlm_eval.checkpoints.folders.unfinished import remove_unfinished

STOPPED = 128
"""Exit code of a process that a signal has ended, less the signal's number, as shells have it."""

_RAISING = (signal.SIGTERM, signal.SIGHUP)
_ENDING = (signal.SIGINT, signal.SIGTERM)

PARENT = "MLM_EVAL_PARENT_PID"
"""Variable of a process that ends with another one: whose end that is."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CUT_SHORT = (
    b"mlm-eval: a file became shorter while it was read, or its disk has failed; copy the "
    b"checkpoint again, and change nothing in it while it is used\n"
)

_stopped_by: list[signal.Signals] = []


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise a KeyboardInterrupt in the body, as SIGINT does; once.

    Signals that are ignored or handled already stay so. For the main thread.
    """
    _stopped_by.clear()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in _RAISING}
        before = {n: old for n, old in before.items() if old == signal.SIG_DFL}
    for number in before:
        signal.signal(number, lambda number, _: None if _stopped_by else raise_stopped(number))
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def raise_stopped(number: int) -> NoReturn:
    """Raise the KeyboardInterrupt of a signal, and note which one it was."""
    _stopped_by.append(signal.Signals(number))
    raise KeyboardInterrupt


def stopped_by() -> signal.Signals:
    """Return the signal of the last KeyboardInterrupt: SIGINT, unless another one is noted."""
    return _stopped_by[0] if _stopped_by else signal.SIGINT


def end_by_signals() -> None:
    """Have SIGINT and SIGTERM end this process whatever it is doing, with nothing left unfinished.

    It dies of the signal, as by the default actions. For the main thread, once.
    """
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in _ENDING:
        signal.signal(number, lambda number, _: None)  # the thread acts
        signal.siginterrupt(number, False)
    os.register_at_fork(after_in_child=_by_default)
    threading.Thread(target=_end_when_woken, args=(woken,), daemon=True).start()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before the line above
        os._exit(1)


def say_bus_errors() -> None:
    """Have this process say why it ends, where a file that it has mapped is cut short meanwhile.

    Nothing can be read on then: the signal comes from the read itself, in whichever thread. The
    handler is C's, because Python's would run after the instruction that cannot end.
    """
    ctypes.CDLL(None).signal(signal.SIGBUS, _bus_error)


_ENDED_BY_ONE = threading.Lock()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _bus_error(_: int) -> None:
    _ENDED_BY_ONE.acquire()  # other threads that read the file stop here, and end with the process
    os.write(2, _CUT_SHORT)
    remove_unfinished()
    os._exit(2)


def _by_default() -> None:
    """Give a child made by fork the default actions: it shares the pipe with its parent."""
    signal.set_wakeup_fd(-1)
    for number in _ENDING:
        signal.signal(number, signal.SIG_DFL)


def _end_when_woken(woken: int) -> None:
    while (number := os.read(woken, 1)[0]) not in _ENDING:
        pass  # a signal that a library handles itself, such as an alarm's
    remove_unfinished()
    # The interpreter lets its main thread alone change an action; libc lets every thread.
    ctypes.CDLL(None).signal(number, ctypes.c_void_p(signal.SIG_DFL))
    os.kill(os.getpid(), number)
