"""Whether a processor returns the point that its local solver has found, or the one from which it began."""

from __future__ import annotations

from abc import ABC, abstractmethod

from typing_extensions import override

from sglight.strategies.pvd.objective import Evaluated


class Acceptance(ABC):
    """A rule by which a processor's point is accepted; add a subclass and its name in `ACCEPTANCES`."""

    @abstractmethod
    def accepts(self, found: Evaluated, start: Evaluated) -> bool:
        """Whether the point found may be returned instead of the start."""


class NoWorse(Acceptance):
    """f(found) <= f(start): what the convergence theory needs of every processor (Ferris & Mangasarian 1994)."""

    @override
    def accepts(self, found: Evaluated, start: Evaluated) -> bool:
        return found.no_worse_than(start)


ACCEPTANCES: dict[str, type[Acceptance]] = {"no_worse": NoWorse}
