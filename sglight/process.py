"""Sets up the process of a run: seeds, threads, memory, and which warnings are shown."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import warnings
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from sglight.compat.lightning import set_rank
from sglight.config.machine import cores
from sglight.networks import NetworkSpec

# Multiplications of a time step on a batch from which a second thread makes it faster.
WORK_FOR_THREADS = 3e7
# Warnings about which the user can do nothing.
NOISE = (
    r".*treespec, LeafSpec",  # about how Lightning uses torch
    r".*torch.jit.script. is deprecated",  # about how torch computes forward-mode derivatives
    r"Detected call of `lr_scheduler.step",  # an estimator first learns `lag` batches later
)


def useful_threads(spec: NetworkSpec, batch_size: int, workers: int = 1) -> int:
    """The number of threads for a worker: its share of the cores if the time steps are large, else one.

    For small steps, threads wait for each other longer than they save, the more so on a busy machine.
    """
    busy = max(spec.step_costs()) * batch_size > WORK_FOR_THREADS
    return max(cores() // workers, 1) if busy else 1


def set_up(plain: Mapping[str, Any], rank: int = 0) -> None:
    """Seed all random generators, set the rank, and silence messages about which the user can do nothing."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.profilers").setLevel(logging.INFO)  # its table, if asked for
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    keep_freed_memory()
    set_rank(rank)  # Lightning would guess it from variables that a scheduler may have left
    if not torch.cuda.is_available():
        # Otherwise each step of an optimiser looks for the driver again, which takes a fifth of a millisecond.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    pl.seed_everything(plain["seed"], workers=True, verbose=False)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB, its largest possible limit.

    Otherwise it returns the memory of larger tensors to the system at every step and has to get it back, which takes
    longer than computing with them.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 2**31 - 1)
