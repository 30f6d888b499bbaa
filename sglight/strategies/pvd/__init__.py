"""Parallel variable distribution: each processor minimises over a block of the weights, then all are synchronised.

Ferris & Mangasarian 1994; Solodov 1997 for inexact subproblems. The variables x are the weights of a network in p
stages; block l are those of stage l (the opening belongs to the first, the classifier to the last). The objective f is
the mean loss on fixed samples plus penalties. An iteration, which is an epoch, goes from x to x+:

    d = directions(-grad f(x))                                       one for each block, see `directions.py`
    (x_l, m) minimises f(x_l, x_j + m_j d_j for j != l), inexactly   processor l, all l at once, from x with m = 0
    x^(l) is that point if it is accepted, otherwise x               see `acceptance.py`; f(x^(l)) <= f(x)
    x+ = best x^(l), or sum_l w_l x^(l) with sum_l w_l = 1           see `synchronisation.py`; f(x+) <= f(x)

The local solver (`local.py`) takes ``local_steps`` steps on each batch of the epoch; with a batch as large as the
training set it is deterministic. Points are compared by f, in full precision.

A worker has the whole network and one or more processors. To evaluate f or its gradient, processor l takes the l-th
part of the samples. Workers exchange, in an iteration: one block and p - 1 scalars for each processor, sums of losses,
and the parts of each gradient of f. Sums of losses are exact and parts of gradients are added in the order of the
processors, so that the result does not depend on the placement, bit for bit.
"""

from sglight.strategies.pvd.loop import PVDLoop
from sglight.strategies.pvd.module import PVD

__all__ = ["PVD", "PVDLoop"]
