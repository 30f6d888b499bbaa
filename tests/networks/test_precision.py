"""Where autocast is followed on the CPU, and where it would be slower."""

from __future__ import annotations

import pytest
import torch

from sglight.networks import Segment, precision


@pytest.mark.parametrize(
    ("units", "batch", "lowered"), [(True, 128, True), (True, 8, False), (False, 128, False)]
)
def test_bf16_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, units: bool, batch: int, lowered: bool
) -> None:
    monkeypatch.setattr(precision, "has_bf16_units", lambda: units)
    segment = Segment("hamiltonian", 2, 256, seed=1)
    x = torch.randn(batch, 512, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = segment(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, segment(x)) is not lowered


def test_units_are_those_of_the_processor() -> None:
    capabilities = {name for name, has in torch.cpu.get_capabilities().items() if has}
    assert precision.has_bf16_units() == bool(capabilities & {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"})
