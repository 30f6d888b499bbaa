"""What went wrong, in one sentence; imports neither torch nor Hydra."""


class UserError(ValueError):
    """A mistake in the command, a file or a set-up.

    The message says in one sentence what was given, what is allowed and which key to change.

    `python -m sglight` prints the message without a traceback and ends with status 1.
    """


class PeerLost(RuntimeError):
    """The worker at the other end has gone or does not answer: a consequence, its own failure is the cause."""
