"""Runs a function in worker processes on this machine, which start together and end together.

`worker.py` has the code of a worker, `server.py` the process that forks workers, and `supervisor.py` the code that
watches them.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

from sglight.errors import Terminated, UserError
from sglight.parallel.private import launch_folder
from sglight.parallel.server import start_context
from sglight.parallel.supervisor import Member, WorkerFailed, end_together, start, stop, watch
from sglight.parallel.worker import Returned, Setting, Status, Worker, current

__all__ = ["Worker", "WorkerFailed", "current", "launch"]


def launch(
    function: Callable[..., Any],
    *args: Any,
    workers: int,
    threads: int | None = None,
    idle_timeout_s: float = 10.0,
    **kwargs: Any,
) -> Any:
    """Run ``function(*args, **kwargs)`` in new processes on this machine; returns the result of worker 0.

    The function must be importable, and everything must pickle.

    Args:
        function: what to run.
        args: of it.
        workers: the number of processes.
        threads: the number of CPU threads of each.
        idle_timeout_s: a worker that does nothing for so many seconds, though it waits for no other, has failed.
        kwargs: of the function.

    Raises:
        UserError: if a worker raised it.
        WorkerFailed: if a worker raised another exception, died or hung. All workers have ended then.
    """
    _check_script()
    task = _pickled_task(function, args, kwargs)
    members: list[Member] = []
    with launch_folder() as folder:
        try:
            context, setting = start_context(), Setting.of_this_process(threads)
            members += [
                Member(context, Worker(rank, workers, folder, Status()), setting) for rank in range(workers)
            ]
            start(members, task)
            watch(members, idle_timeout_s)
        except Terminated as error:
            end_together(members, error.signum)
            raise
        finally:
            stop(members)
    report = members[0].report
    assert isinstance(report, Returned)
    return pickle.loads(report.value)


def _check_script() -> None:
    """Refuse a script that workers cannot import; they import the main module as multiprocessing does."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is not None and getattr(main, "__spec__", None) is None and not os.path.exists(path):
        raise UserError(
            f"workers cannot be started by a script from {path}, which is no file: save it as one, or train in one "
            "process with trainer.devices=1"
        )


def _pickled_task(*task: Any) -> bytes:
    try:
        # Not multiprocessing's own pickler: there torch sends tensors as open files.
        return pickle.dumps(task)
    except Exception as error:  # of whatever class what does not pickle chooses
        raise UserError(
            f"this cannot go to worker processes: {error}; define functions and classes at the top of a module, "
            "or train in one process with trainer.devices=1"
        ) from error
