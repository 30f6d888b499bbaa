"""Peak memory of all workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglight.callbacks.memory import PeakMemory, forget_peak, peak_bytes
from tests.callbacks.common import fit

CPU = torch.device("cpu")


def test_the_peak_is_measured_anew(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux forgets")
    forget_peak()
    assert peak_bytes(CPU) < 60 << 20
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 << 20 <= peak_bytes(CPU) < 100 << 20
    del held
    forget_peak()
    assert peak_bytes(CPU) < 60 << 20


def test_one_worker_has_one_peak(tmp_path: Path) -> None:
    memory = PeakMemory()
    forget_peak()
    trainer = fit([memory], tmp_path, epochs=1)
    assert 0 < trainer.callback_metrics["memory/peak_bytes"] <= memory.peaks[0]
    assert "memory/peak_bytes" not in fit([PeakMemory(curves=False)], tmp_path, epochs=1).callback_metrics
    assert memory.metrics() == {"memory/peak_bytes": memory.peaks[0]}
    assert memory.peaks[0] < 500 << 20  # the libraries do not count


def test_of_several_the_largest_counts() -> None:
    memory = PeakMemory()
    memory.peaks = [3, 7]
    found = memory.metrics()
    assert found == {"memory/peak_bytes": 7, "memory/worker_0_peak_bytes": 3, "memory/worker_1_peak_bytes": 7}
