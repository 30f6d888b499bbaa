"""What a benchmark ran on, and how many threads it may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")  # Linux only
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def processor() -> str:
    """The processor's name, with the vector instructions that torch uses."""
    import torch  # imported where needed: some scripts only pass on what other processes measure

    return f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def facts() -> dict[str, str | int | float]:
    """Processor, cores, load, versions, and the environment variables that change how fast torch is."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_", "MALLOC_"))},
    }


def summary() -> str:
    """Processor, cores and versions in one line."""
    import torch

    return f"{cpu_model()}, {cores()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def set_threads(threads: int) -> None:
    """Let torch use so many threads in this process, and in those that it starts."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
