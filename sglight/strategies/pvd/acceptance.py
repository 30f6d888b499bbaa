"""Rules that decide whether a processor returns the point that it found, or the one from which it began."""

from __future__ import annotations

from abc import ABC, abstractmethod

from typing_extensions import override

from sglight.strategies.pvd.objective import Evaluated


class Acceptance(ABC):
    """A rule that accepts or refuses the point of a processor. For a new one add a subclass to `ACCEPTANCES`."""

    @abstractmethod
    def accepts(self, found: Evaluated, start: Evaluated) -> bool:
        """Whether the point found may be returned instead of the start."""


class NoWorse(Acceptance):
    """Accepts a point if f(found) <= f(start), which the convergence theory needs (Ferris & Mangasarian 1994)."""

    @override
    def accepts(self, found: Evaluated, start: Evaluated) -> bool:
        return found.no_worse_than(start)


ACCEPTANCES: dict[str, type[Acceptance]] = {"no_worse": NoWorse}
