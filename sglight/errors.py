"""What the user did wrong, in one sentence; imports neither torch nor Hydra."""


class UserError(ValueError):
    """A mistake in the command, a file or a set-up.

    The message says in one sentence what was given, what is allowed and which key to change.

    `python -m sglight` prints the message without a traceback and ends with status 1.
    """
