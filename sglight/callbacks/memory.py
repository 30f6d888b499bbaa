"""Measures the peak memory of each worker."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from sglight.strategies.staged import StagedModule


class PeakMemory(Callback):
    """Measures by how much the memory of each worker grew at most since `forget_peak` was called.

    Args:
        curves: whether to log the peak after each epoch.

    Attributes:
        peaks: bytes, for each worker.
    """

    def __init__(self, curves: bool = True) -> None:
        self.curves = curves
        self.peaks: list[int] = []

    def metrics(self) -> dict[str, int]:
        """``memory/peak_bytes``, the largest of all workers, and that of each worker if there are several."""
        each = {f"memory/worker_{r}_peak_bytes": peak for r, peak in enumerate(self.peaks)}
        return {"memory/peak_bytes": max(self.peaks, default=0), **(each if len(each) > 1 else {})}

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.curves:
            self._measure(trainer, pl_module)
            pl_module.log_dict({name: float(peak) for name, peak in self.metrics().items()})

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure(trainer, pl_module)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, StagedModule)
        peers, own = module.placement.peers, peak_bytes(trainer.strategy.root_device)
        self.peaks = [
            int(b) for b in peers.total([own * (r == peers.rank) for r in range(peers.size)]).result()
        ]


# Bytes that were in use when `forget_peak` was called, by type of device.
_in_use_before: dict[str, int] = {}


def forget_peak() -> None:
    """Starts the measurement anew. The jobs of a sweep share a process, so its unused memory is released first."""
    _load_common_libraries()
    gc.collect()
    with suppress(OSError, AttributeError):  # GNU's C library only
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        _in_use_before["cuda"] = torch.cuda.max_memory_allocated()
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")
    _in_use_before["cpu"] = _resident_peak()


def _load_common_libraries() -> None:
    """Loads what torch and matplotlib load when they are first used; it would count for the first job of a sweep."""
    import matplotlib.backends.backend_agg
    import matplotlib.font_manager  # noqa: F401

    weight = torch.nn.Parameter(torch.ones(8, 8))
    torch.tanh(torch.ones(8, 8) @ weight).sum().backward()
    torch.optim.Adam([weight]).step()


def peak_bytes(device: torch.device) -> int:
    """The peak since `forget_peak`, less what was in use then: memory of torch on CUDA, of the process on the CPU."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak()
    return max(peak - _in_use_before.get("cuda" if device.type == "cuda" else "cpu", 0), 0)


def _resident_peak() -> int:
    """The largest resident set of this process in bytes; on Linux since `forget_peak`."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
