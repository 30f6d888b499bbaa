"""Makes sure that printing never ends a run, if the terminal lacks a character or the disk is full."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any

from typing_extensions import override


class Tolerant(io.TextIOWrapper):
    """A stream that discards its output once it cannot be written any more."""

    @override
    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._give_up()
            return len(text)

    @override
    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            super().flush()


def tolerate() -> None:
    """Make the output and error streams of this process `Tolerant`; streams that were replaced are left alone."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, _tolerant(getattr(sys, name)))


def escape_unknown() -> None:
    """Replace characters that the encoding of the output does not have; other errors of writing are still raised."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _tolerant(stream: Any) -> Any:
    if type(stream) is not io.TextIOWrapper or stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    stream.flush()
    # Not `detach`: handlers of logging may still use the old stream.
    return Tolerant(
        stream.buffer, stream.encoding, "replace",
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip
