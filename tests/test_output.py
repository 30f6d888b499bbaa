"""Streams that cannot be written any more end nothing."""

import subprocess
import sys

from tests.conftest import ROOT

EARLIER_HANDLER = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
from sglight.output import tolerate
tolerate()
logging.info("by a handler from before")
print("by the new stream", file=sys.stderr)
logging.info("and again")
"""


def test_a_handler_from_before_goes_on_writing():
    done = subprocess.run(
        [sys.executable, "-c", EARLIER_HANDLER], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines() == ["by a handler from before", "by the new stream", "and again"]
