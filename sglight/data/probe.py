"""Reads the arrays of a user's file once, in another process, because the HDF5 library crashes on some damaged files.

    python -m sglight.data.probe FILE ARRAY ...

prints {"bad": {array: [count of numbers that are not finite, row of the first]}} or {"error": reason}.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sglight.data.statistics import slabs


class Unreadable(Exception):
    """The file cannot be read; the text says why."""


def probe(path: Path, keys: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Which arrays hold NaN or infinity: for each of those, how many and the row of the first.

    Raises:
        Unreadable: the file is damaged.
    """
    command = [sys.executable, "-m", "sglight.data.probe", str(path), *keys]
    package = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": search}
    )
    if done.returncode < 0:
        raise Unreadable(f"the HDF5 library fails on it with signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")  # an error of ours, not of the file
    result = json.loads(done.stdout)
    if "error" in result:
        raise Unreadable(result["error"])
    found: dict[str, tuple[int, int]] = result["bad"]
    return found


def survey(path: Path, keys: Sequence[str]) -> dict[str, tuple[int, int]]:
    """`probe` within this process; leaves out arrays that cannot be unpacked or lie in another file."""
    load_filters()
    with h5py.File(path, "r", locking=False) as file:
        arrays = {key: file[key] for key in keys if isinstance(file.get(key), h5py.Dataset)}
        places = {
            key: not_finite(array)
            for key, array in arrays.items()
            if array.shape and in_one_file(array) and not missing_filters(array)
        }
    return {key: place for key, place in places.items() if place is not None}


def not_finite(array: Any) -> tuple[int, int] | None:
    """How many numbers are not finite, and the row of the first; None if all are finite."""
    count, first = 0, -1
    for rows in slabs(array.shape, array.dtype.itemsize):
        values = array[rows]
        if values.dtype.kind != "f":
            continue
        bad = ~np.isfinite(values.reshape(len(values), -1))
        if bad.any():
            first = first if count else rows.start + int(bad.any(1).argmax())
            count += int(bad.sum())
    return (count, first) if count else None


def in_one_file(array: h5py.Dataset) -> bool:
    """Whether the numbers of an array are in its own file, not in another one that it refers to."""
    return not array.is_virtual and not array.external


def missing_filters(array: h5py.Dataset) -> list[str]:
    """The compression filters of an array that are not installed."""
    plist = array.id.get_create_plist()
    filters = [plist.get_filter(number) for number in range(plist.get_nfilters())]
    return [
        f"{code} ({name.decode(errors='replace')})" if name else str(code)
        for code, _, _, name in filters
        if not h5py.h5z.filter_avail(code)
    ]


def load_filters() -> None:
    """Registers the compression filters of the package hdf5plugin, if it is installed."""
    try:
        import hdf5plugin  # noqa: F401
    except ImportError:
        return


if __name__ == "__main__":
    try:
        print(json.dumps({"bad": survey(Path(sys.argv[1]), sys.argv[2:])}))
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as problem:
        print(json.dumps({"error": " ".join(str(problem).split()) or type(problem).__name__}))
