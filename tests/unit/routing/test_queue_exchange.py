"""What waits at other replicas is what each of them said last, without one's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorax_ingress.routing.shares import QueueExchange

_NAMES = st.sampled_from(("a", "b", "c"))
_DEPTHS = st.dictionaries(
    st.sampled_from(("x", "y")), st.tuples(st.integers(0, 3), st.integers(0, 9))
)


@given(st.lists(st.tuples(_NAMES, st.none() | _DEPTHS), max_size=20))
def test_others_are_summed_whatever_came_before(
    said: list[tuple[str, dict[str, tuple[int, int]] | None]],
) -> None:
    exchange, latest = QueueExchange(), {}
    for name, depths in said:
        if depths is None:
            exchange.leave(name)
            latest.pop(name, None)
        else:
            exchange.report(name, depths)
            latest[name] = depths
        for own in "abc":
            others = [each for other, each in latest.items() if other != own]
            for tenant in "xy":
                waiting = [each.get(tenant, (0, 0)) for each in others]
                expected = sum(each[0] for each in waiting), sum(each[1] for each in waiting)
                assert exchange.elsewhere(own).get(tenant, (0, 0)) == expected
    for name in "abc":
        exchange.leave(name)
    assert exchange.elsewhere("a") == {}
