"""What is printed never ends a run: a terminal may not know the characters, a disk may be full."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any

from typing_extensions import override


class Tolerant(io.TextIOWrapper):
    """A stream that goes on to nowhere once it cannot be written any more."""

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
    """Make the output and error streams of this process tolerant; those that are none of its files stay."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, _tolerant(getattr(sys, name)))


def escape_unknown() -> None:
    """Replace characters that the output's encoding does not have; a stream that cannot be written still fails."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _tolerant(stream: Any) -> Any:
    if type(stream) is not io.TextIOWrapper or stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    stream.flush()
    # Not detached: handlers of logging may hold the stream from before.
    return Tolerant(
        stream.buffer, stream.encoding, "replace",
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip
