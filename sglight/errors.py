"""What went wrong, in one sentence; imports neither torch nor Hydra."""

import signal


class UserError(ValueError):
    """A mistake in the command, a file or a set-up.

    The message says in one sentence what was given, what is allowed and which key to change.

    `python -m sglight` prints the message without a traceback and ends with status 1.
    """


class RunFailed(UserError):
    """It was not the command: the run was under way."""


class Diverged(RunFailed):
    """The training has come to numbers that are none; a sweep counts the job as one of the worst value."""


class Terminated(BaseException):
    """A signal asks the process to end.

    Attributes:
        signum: its number. elsewhere: whether another worker got it.
    """

    def __init__(self, signum: int, elsewhere: bool = False) -> None:
        super().__init__(signum, elsewhere)
        self.signum, self.elsewhere = signum, elsewhere


def interruption(error: BaseException | None) -> int | None:
    """The number of the signal that has brought an exception about, by itself or while it was answered."""
    while error is not None:
        if isinstance(error, Terminated):
            return error.signum
        if isinstance(error, KeyboardInterrupt):
            return int(signal.SIGINT)
        error = error.__cause__ or error.__context__
    return None


class PeerLost(RuntimeError):
    """The worker at the other end has gone or does not answer: a consequence, its own failure is the cause."""
