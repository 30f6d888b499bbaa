"""Random numbers by name."""

from __future__ import annotations

import torch

from sglight.networks.seeding import draw_seed, generator, normal

GOLDEN = [-0.356454, -0.210384, -0.204139]


def test_a_stream_depends_on_its_seed_and_place_only() -> None:
    first = normal((5,), 1.0, 3, "segments", 0, "weight", 1)
    normal((100,), 1.0, 3, "segments", 0, "weight", 0)
    torch.manual_seed(1)
    assert torch.equal(first, normal((5,), 1.0, 3, "segments", 0, "weight", 1))


def test_different_places_and_seeds_are_different_streams() -> None:
    places = [
        (seed, kind, k) for seed in (0, 1, 2**61) for kind in ("segments", "connectors") for k in range(20)
    ]
    draws = {tuple(normal((3,), 1.0, *place).tolist()) for place in places}
    assert len(draws) == len(places)
    # Names do not run together.
    assert generator(1, "a", 11).initial_seed() != generator(1, "a", 1, 1).initial_seed()
    assert generator(1, "1").initial_seed() != generator(1, 1).initial_seed()


def test_the_streams_stay_what_they_were() -> None:
    """Golden: a change of these numbers changes every seeded run."""
    torch.testing.assert_close(
        normal((3,), 1.0, 1, "segments", 0, "weight", 0), torch.tensor(GOLDEN), rtol=0, atol=1e-6
    )


def test_standard_deviation() -> None:
    assert abs(float(normal((20000,), 0.3, 1, "x").std()) - 0.3) < 0.01


def test_the_drawn_seed_comes_from_torch() -> None:
    torch.manual_seed(4)
    a = draw_seed()
    torch.manual_seed(4)
    assert a == draw_seed() != draw_seed()
