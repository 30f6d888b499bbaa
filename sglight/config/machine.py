"""Finds out about this machine without torch: its GPUs, for checks of the config, and its processor, for results."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sglight import units
from sglight.errors import UserError

GPUS = ("gpu", "cuda")


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Refuse a GPU if there is none, and more workers than GPUs unless they share devices.

    Only what is certainly wrong is refused here; torch finds the rest when it is imported.

    Raises:
        UserError: that names the key and the remedy.
    """
    asked = str(trainer["accelerator"])
    if asked == "mps" and sys.platform != "darwin":
        raise UserError(
            "trainer.accelerator=mps is for Apple's machines; use trainer.accelerator=auto or cpu"
        )
    if asked not in GPUS:
        return
    if without_cuda():
        raise UserError(
            f"trainer.accelerator={asked}, but the torch that is installed is built without GPU support; install "
            "another, or use trainer.accelerator=cpu"
        )
    found = gpus()
    if found == 0:
        raise UserError(
            f"trainer.accelerator={asked}, but this machine has no GPU; use trainer.accelerator=cpu"
        )
    if found is not None and trainer["devices"] > found and not trainer["share_devices"]:
        raise UserError(
            f"trainer.devices={trainer['devices']}, but this machine has {found} GPU(s): lower it, add "
            "trainer.share_devices=true to let workers take turns, or trainer.accelerator=cpu"
        )


def gpus(devices: Path = Path("/dev")) -> int | None:
    """The largest possible number of GPUs; None if it cannot be found without torch."""
    if not sys.platform.startswith("linux") or any((devices / name).exists() for name in ("kfd", "dxg")):
        return None  # GPUs of other makers, and the Windows Subsystem for Linux
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.glob("nvidia*"))


def without_cuda() -> bool:
    """Whether the installed torch was built without GPU support, according to its file `version.py`."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return False
    return all(re.search(rf"^{name}\b.*= None$", text, re.MULTILINE) for name in ("cuda", "hip"))


def processor() -> str:
    """The model of the CPU and how many of its cores this process may use."""
    name = ""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1] if found else ""
    except OSError:
        pass
    return f"{' '.join(name.split()) or 'CPU'}, {units.plural(cores(), 'core')}"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
