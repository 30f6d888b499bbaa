"""Parallel variable distribution: processors that each minimise over a block of the weights, and then synchronise.

Ferris & Mangasarian 1994; Solodov 1997 for inexact subproblems. The variables x are the weights of a network that is
cut into p stages: block l is what belongs to stage l, a range of time (with the first the opening, with the last the
classifier, a connector with the step before it). The objective f is the mean loss on fixed samples plus penalties.
An iteration, which is an epoch, goes from x to x+:

    d = directions(-grad f(x))                                       one a block, see `directions.py`
    (x_l, m) minimises f(x_l, x_j + m_j d_j for j != l), inexactly   processor l, all l at once, from x with m = 0
    x^(l) is that point if it is accepted, otherwise x               see `acceptance.py`; f(x^(l)) <= f(x)
    x+ = best x^(l), or sum_l w_l x^(l) with sum_l w_l = 1           see `synchronisation.py`; f(x+) <= f(x)

The local solver (`local.py`) sees the epoch's batches and takes ``local_steps`` steps on each; a batch as large as the
training set makes it a deterministic one. All that is compared is compared on f, in full precision.

A worker has the whole network and one or more processors. What f and its gradient cost is shared: processor l takes
the l-th part of the samples. What crosses between workers in an iteration is one block and p - 1 scalars a processor,
sums of losses, and the parts of each gradient of f, the one thing as long as the network: not to send it, every
worker would have to compute all of it. Sums of losses are exact and parts of gradients are added in the order of the
processors, so that the result does not depend on the placement, bit for bit.
"""

from sglight.strategies.pvd.loop import PVDLoop
from sglight.strategies.pvd.module import PVD

__all__ = ["PVD", "PVDLoop"]
