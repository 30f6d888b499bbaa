"""What `first_batch.py` lets the command write to the file $STAMPS: when jobs end and training batches begin."""

from __future__ import annotations

import json
import os
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from hydra.experimental.callback import Callback


def stamp(kind: str) -> None:
    """Add a line: what happened, the time by a clock that all processes share, the CPU seconds of this process."""
    with Path(os.environ["STAMPS"]).open("a") as file:
        file.write(json.dumps([kind, perf_counter(), process_time()]) + "\n")


class Jobs(Callback):
    """Notes the end of each job."""

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        """Is called by Hydra."""
        stamp("end")
