"""The exceptions of sglight; imports neither torch nor Hydra."""

import signal


class UserError(ValueError):
    """A mistake in the command, a file or the installation.

    The message says in one sentence what was given, what is allowed and which key to change. `python -m sglight` prints
    it without a traceback and ends with status 1.
    """


class RunFailed(UserError):
    """An error after the run had begun, so that the command itself was not wrong."""


class Diverged(RunFailed):
    """The loss or the weights are not finite any more. The job of a sweep returns NaN then."""


class Terminated(BaseException):
    """A signal asks the process to end.

    Attributes:
        signum: the number of the signal.
        elsewhere: whether another worker got it.
    """

    def __init__(self, signum: int, elsewhere: bool = False) -> None:
        super().__init__(signum, elsewhere)
        self.signum, self.elsewhere = signum, elsewhere


def interruption(error: BaseException | None) -> int | None:
    """The number of the signal that caused an exception, directly or through others; None if none did."""
    while error is not None:
        if isinstance(error, Terminated):
            return error.signum
        if isinstance(error, KeyboardInterrupt):
            return int(signal.SIGINT)
        error = error.__cause__ or error.__context__
    return None


class PeerLost(RuntimeError):
    """Another worker has ended or does not answer. This is a consequence; the failure of that worker is the cause."""
