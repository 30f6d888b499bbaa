"""The directions against their definitions."""

from __future__ import annotations

import pytest
import torch

from sglight.strategies.pvd.directions import DIRECTIONS, Directions
from tests.strategies.pvd.common import point


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_all_directions_descend_in_every_block(kind: str) -> None:
    directions = Directions(kind)
    for seed in range(3):
        g = point(seed)
        assert all(torch.dot(a, b) < 0 for a, b in zip(g, directions(g), strict=True))


def test_directions_are_what_they_are_called() -> None:
    g = [torch.tensor([3.0, -4.0]), torch.tensor([0.0, 0.0])]
    assert torch.equal(Directions("gradient")(g)[0], torch.tensor([-3.0, 4.0]))
    normalised = Directions("normalised")(g)
    assert normalised[0].norm() == pytest.approx(1) and torch.equal(normalised[1], torch.zeros(2))
    rms = Directions("rms")
    torch.testing.assert_close(rms(g)[0], torch.tensor([-1.0, 1.0]))
    assert torch.equal(rms(g)[1], torch.zeros(2))
    # After two equal gradients and one of half the size: v = (0.9^2 + 0.9 + 1/4) / (0.9^2 + 0.9 + 1) g^2.
    expected = 0.5 / ((0.81 + 0.9 + 0.25) / (0.81 + 0.9 + 1)) ** 0.5
    torch.testing.assert_close(rms([block / 2 for block in g])[0], torch.tensor([-expected, expected]))


def test_unknown_directions_are_named() -> None:
    with pytest.raises(ValueError, match=r"strategy\.directions=newton .* gradient, normalised or rms"):
        Directions("newton")
