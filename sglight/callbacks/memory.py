"""The most memory that each worker took."""

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
    """Measures by how much the memory of all workers grew at most, from `forget_peak` to the end of training or test.

    Args:
        curves: whether to log the peak so far after each epoch, too.

    Attributes:
        peaks: bytes by worker.
    """

    def __init__(self, curves: bool = True) -> None:
        self.curves = curves
        self.peaks: list[int] = []

    def metrics(self) -> dict[str, int]:
        """``memory/peak_bytes``, of the worker that took the most, and each worker's if there are several."""
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


# What the process, or the device, had when `forget_peak` was called, by the device's type.
_begun_with: dict[str, int] = {}


def forget_peak() -> None:
    """Begin to measure anew: the jobs of a sweep share a process, whose memory is given back first."""
    _load_what_every_run_does()
    gc.collect()
    with suppress(
        OSError, AttributeError
    ):  # GNU's C library only: what it keeps would not have to grow again
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        _begun_with["cuda"] = torch.cuda.max_memory_allocated()
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")
    _begun_with["cpu"] = _resident_peak()


def _load_what_every_run_does() -> None:
    """What torch and the figures load when they are first used would count for the first job of a sweep only."""
    import matplotlib.backends.backend_agg
    import matplotlib.font_manager  # noqa: F401

    weight = torch.nn.Parameter(torch.ones(8, 8))
    torch.tanh(torch.ones(8, 8) @ weight).sum().backward()
    torch.optim.Adam([weight]).step()


def peak_bytes(device: torch.device) -> int:
    """Growth to the peak since `forget_peak`: allocated by torch on CUDA, resident set of the process on the CPU."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak()
    return max(peak - _begun_with.get("cuda" if device.type == "cuda" else "cpu", 0), 0)


def _resident_peak() -> int:
    """The largest resident set of this process, since it was last forgotten where that is possible."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
