"""Refusals of numbers of replicas; imports no torch."""

from __future__ import annotations


def check_divides(replicas: int, workers: int) -> None:
    """Refuse a number of replicas that does not divide the number of workers.

    Raises:
        ValueError: about ``trainer.replicas``.
    """
    if workers % replicas:
        raise ValueError(
            f"trainer.replicas={replicas} does not divide the {workers} worker(s) that trainer.devices and "
            "trainer.num_nodes make; let their product be a multiple of it"
        )


def refuse_in_pvd(replicas: int) -> None:
    """Refuse replicas with parallel variable distribution.

    Raises:
        ValueError: about ``trainer.replicas``.
    """
    if replicas > 1:
        raise ValueError(
            f"trainer.replicas={replicas} does not go with strategy=pvd, whose processors share the samples of the "
            "objective already; use more strategy.processors, and set trainer.replicas=1"
        )
