"""Importing this ends the process with its parent (Linux): the server of workers does so before it imports torch.

It would notice only afterwards, seconds later, that nobody is left who needs it.
"""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
