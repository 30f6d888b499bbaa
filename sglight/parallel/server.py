"""The server from which workers are forked; it imports their libraries once, so that later workers start quickly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from typing import Any

from sglight.compat.multiprocessing import forkserver_pid
from sglight.signals import ENDING

PRELOAD = ["torch", "sglight.parallel.lean", "sglight.experiment"]
TIED = "sglight.parallel.tied"  # the first module that the server imports

BLOCKED = {signal.SIGINT, *ENDING}  # signals that the server does not receive

Context = Any  # of multiprocessing


def start_context() -> Context:
    """The context to start workers in: forked from the server, which is started here; or spawned without one."""
    methods = multiprocessing.get_all_start_methods()
    if multiprocessing.get_start_method() not in methods:
        # In a process of joblib, whose start method workers would not know.
        multiprocessing.set_start_method("spawn", force=True)
    if "forkserver" not in methods:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The signal comes at the end of the thread that has started the server, so this must be the main thread.
    tied = [TIED] if threading.current_thread() is threading.main_thread() else []
    context.set_forkserver_preload([*tied, *PRELOAD])
    _start_server()
    return context


def _start_server() -> None:
    """Start the server, unless it runs, without threads of OpenBLAS and with signals to the process group blocked.

    Signals are blocked in the workers as well, until they install their own handlers.
    """
    from multiprocessing import forkserver  # not on every system

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    resource_tracker.ensure_running()  # or it would be started with the server and unblock the signals
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    given = "OPENBLAS_NUM_THREADS" in os.environ
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        forkserver.ensure_running()
    finally:
        if not given:
            del os.environ["OPENBLAS_NUM_THREADS"]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def stop_server() -> None:
    """Kill the server: while it is importing it would not notice that it is not needed any more."""
    if pid := forkserver_pid():
        os.kill(pid, signal.SIGKILL)
