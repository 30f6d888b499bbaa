"""The command `python -m sglight.plan` finds the fastest way to use workers; its --help imports no torch."""

from __future__ import annotations

import sys

from sglight.config.composing import CONF
from sglight.config.explanations import explain
from sglight.errors import UserError
from sglight.output import tolerate

USAGE = """usage: python -m sglight.plan [group=choice ...] [key=value ...] [plan.key=value ...]

Prints the fastest ways to split a number of workers into groups of stages and replicas, and a batch into pieces, by
simulation. The keys plan.*, with their defaults:
  plan.workers=1       how many there are
  plan.bandwidth=1e9   bytes a second from one worker to another
  plan.latency=1e-4    seconds that a message takes besides
  plan.flops=null      operations a second of a worker; null: measured on this machine
  plan.cores=null      cores that all workers share; null: each has a device of its own
  plan.split=null      one split to simulate only that: [groups, replicas, pieces]
All other keys are those of python -m sglight; see its --help."""


def main() -> None:
    """Run the command: print the fastest splits, or a sentence about a mistake on the command line."""
    tolerate()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        return
    from sglight.planning import run  # imports torch

    try:
        run(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if type(error).__module__.startswith(("hydra", "omegaconf")):
            sys.exit(f"error: {explain(error, CONF, sys.argv[1:])}")
        raise


if __name__ == "__main__":
    main()
