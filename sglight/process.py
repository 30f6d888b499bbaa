"""What a run sets up in its process: seeds, threads, memory, and silence about what the user cannot change."""

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

# Multiplications of a time step on a batch above which a second thread pays.
WORK_FOR_THREADS = 3e7
# Warnings that the user can do nothing about.
NOISE = (
    r".*treespec, LeafSpec",  # Lightning's use of torch
    r".*torch.jit.script. is deprecated",  # torch's own use of it, for forward-mode derivatives
    r"Detected call of `lr_scheduler.step",  # an estimator first learns `lag` batches later
)


def useful_threads(spec: NetworkSpec, batch_size: int, workers: int = 1) -> int:
    """A worker's share of the cores for steps that keep them busy, otherwise one.

    Threads that wait for each other cost more than they bring, the more so when the machine has other work: a thread
    that is not scheduled holds up all.
    """
    busy = max(spec.step_costs()) * batch_size > WORK_FOR_THREADS
    return max(cores() // workers, 1) if busy else 1


def set_up(plain: Mapping[str, Any], rank: int = 0) -> None:
    """Seed, and silence from Lightning about what the user cannot change."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.profilers").setLevel(logging.INFO)  # its table, if asked for
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    keep_freed_memory()
    set_rank(rank)  # whatever variables a scheduler has left
    if not torch.cuda.is_available():
        # Otherwise every step of an optimiser looks for the driver again, at a fifth of a millisecond each.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    pl.seed_everything(plain["seed"], workers=True, verbose=False)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory up to 32 MiB a piece, its most.

    Otherwise it hands tensors of some MiB back to the system and faults them in again at every step, which takes
    longer than what is computed with them.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 2**31 - 1)
