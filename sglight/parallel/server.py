"""The server from which workers are forked: it imports what they need once, so that later workers start at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from typing import Any

from sglight.compat.multiprocessing import forkserver_pid
from sglight.signals import ENDING

PRELOAD = ["torch", "pytorch_lightning", "sglight.experiment"]
TIED = "sglight.parallel.tied"  # imported first

DEAF = {signal.SIGINT, *ENDING}

Context = Any  # of multiprocessing


def start_context() -> Context:
    """How to start workers: forked from the server, which runs then; or afresh where there is none."""
    methods = multiprocessing.get_all_start_methods()
    if multiprocessing.get_start_method() not in methods:
        # In a process of joblib's, whose own method the workers would not know.
        multiprocessing.set_start_method("spawn", force=True)
    if "forkserver" not in methods:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # What the system takes for the parent is the thread that starts it.
    tied = [TIED] if threading.current_thread() is threading.main_thread() else []
    context.set_forkserver_preload([*tied, *PRELOAD])
    _start_server()
    return context


def _start_server() -> None:
    """Start the server unless it runs: without threads of OpenBLAS, and deaf to signals that a whole group gets.

    What it forks is deaf as well, until it answers them.
    """
    from multiprocessing import forkserver  # not everywhere

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF)
    resource_tracker.ensure_running()  # otherwise started with the server, when it would lift the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, DEAF)
    given = "OPENBLAS_NUM_THREADS" in os.environ
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        forkserver.ensure_running()
    finally:
        if not given:
            del os.environ["OPENBLAS_NUM_THREADS"]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def stop_server() -> None:
    """End the server: while it imports things it would not notice that nobody needs it."""
    if pid := forkserver_pid():
        os.kill(pid, signal.SIGKILL)
