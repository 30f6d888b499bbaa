"""Arguments of classes from outside: what they do not take, and what they need, is said by the key."""

from __future__ import annotations

from typing import Any

import pytest

from sglight.config.extension import check_arguments
from sglight.errors import UserError


class Base:
    def __init__(self, network: Any, optimizer: Any, lag: int = 1) -> None: ...


class HandsOn(Base):
    def __init__(self, network: Any, width: int, **rest: Any) -> None: ...


class Same(HandsOn):
    pass


class TakesAll:
    def __init__(self, name: str = "", *args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Base, {"optimizer": 1}),
        (HandsOn, {"width": 1, "lag": 2, "optimizer": 1}),
        (Same, {"width": 1}),  # whether it gives its base an optimiser is its own affair
        (TakesAll, {"name": "x", "any": 1}),
        (object, {}),
    ],
)
def test_what_fits_passes(kind: type, given: dict[str, Any]) -> None:
    network = {} if kind in (TakesAll, object) else {"network": 0}
    check_arguments(kind, network | given, "strategy", {"network"})


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (Base, {}, r"strategy\.optimizer is missing, which Base needs"),
        (Same, {"lag": 1}, r"strategy\.width is missing, which Same needs"),
        (
            Base,
            {"optimizer": 1, "lagg": 1},
            r"strategy\.lagg is unknown to Base; did you mean lag\? \(one of lag, opt",
        ),
        (Same, {"width": 1, "depth": 1}, r"strategy\.depth is unknown to Same; .*lag, optimizer, width"),
    ],
)
def test_what_does_not_fit_is_named(kind: type, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_arguments(kind, {"network": 0, **given}, "strategy", {"network"})
