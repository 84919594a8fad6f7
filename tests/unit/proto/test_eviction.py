"""What keeping something is worth, on disk, in memory and on the device."""

from __future__ import annotations

import pytest

from lorax_contract.eviction import worth

USUAL = {"floor": 1.0, "uses": 2.0, "cost_s": 1.0, "nbytes": 100}


@pytest.mark.parametrize("less", [{"floor": 0.5}, {"uses": 1.0}, {"cost_s": 0.1}, {"nbytes": 1000}])
def test_old_rare_cheap_and_large_is_worth_less(less: dict[str, float]) -> None:
    assert worth(**{**USUAL, **less}) < worth(**USUAL)  # type: ignore[arg-type]


def test_what_takes_no_bytes_has_a_worth() -> None:
    assert worth(0.0, 1.0, 1.0, 0) == 1.0
