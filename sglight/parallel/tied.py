"""Ends the process that imports this when its parent ends (Linux only).

The server of workers imports it first. Otherwise it would notice the end of its parent only after it has imported
torch, some seconds later.
"""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
