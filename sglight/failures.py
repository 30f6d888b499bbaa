"""Turns errors of Lightning and of a full disk during a run into one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_fabric.utilities.exceptions import MisconfigurationException

from sglight.errors import Diverged, RunFailed, UserError

# Error numbers that mean that there is no room for a file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Context that raises a `UserError` for settings that Lightning refuses, for overflows and for a full disk."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(
            f"Lightning refuses the settings of trainer: {' '.join(str(error).split())}"
        ) from error
    except OverflowError as error:
        raise Diverged(
            f"a number has become too large ({error}); lower strategy.scheduler.gamma or strategy.optimizer.lr"
        ) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _full(folder, error) from error
    except RuntimeError as error:
        if "PytorchStreamWriter failed" in str(error) or "file write failed" in str(error):
            raise _full(folder, error) from error
        if "Early stopping conditioned on metric" not in str(error):
            raise
        raise UserError(f"callbacks.early_stopping.monitor: {' '.join(str(error).split())}") from error


def _full(folder: Path, error: Exception) -> RunFailed:
    reason = error.strerror if isinstance(error, OSError) else "the disk takes no more"
    return RunFailed(
        f"{folder} cannot be written: {reason}; make room there, or choose another hydra.run.dir"
    )
