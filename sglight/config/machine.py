"""What this machine has, found out without torch: GPUs before a run begins, names and versions for its results."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sglight.errors import UserError

GPUS = ("gpu", "cuda")


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Refuse a GPU where there is none, and more workers than GPUs unless they share.

    Only what is certain is refused: torch, once it is there, knows the rest.

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
    """How many GPUs there can be at most; None where nobody can tell without torch."""
    if not sys.platform.startswith("linux") or any((devices / name).exists() for name in ("kfd", "dxg")):
        return None  # other makers, and Windows' subsystem for Linux
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.glob("nvidia*"))


def without_cuda() -> bool:
    """Whether the torch that is installed cannot use a GPU, as its own note of versions says."""
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
    return f"{' '.join(name.split()) or 'CPU'}, {cores()} core{'' if cores() == 1 else 's'}"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
