"""What follows from a row's parameters is found out once."""

from __future__ import annotations

from tests.helpers.sampling import make_row

from lorax_shard.sampling.table import KnownSettings


def test_settings_are_known_as_long_as_their_rows_take_turns() -> None:
    """Rows of several vocabularies are drawn one after the other, in each step."""
    known = KnownSettings()
    parts = [[make_row(seed=number, do_sample=True) for number in range(3)] for _ in range(4)]
    first = [known.of(part) for part in parts]
    again = [known.of(part) for part in parts]
    for before, after in zip(first, again, strict=True):
        assert all(a is b for a, b in zip(before, after, strict=True))


def test_settings_of_rows_that_are_gone_are_dropped() -> None:
    known = KnownSettings(most=10)
    last = []
    for _ in range(50):
        last = [make_row(do_sample=True) for _ in range(4)]
        known.of(last)
        assert len(known) <= 10
    many = [make_row(do_sample=True) for _ in range(30)]
    known.of(many)
    assert len(known) == 30
    assert [each.params for each in known.of(many)] == [row.params for row in many]
    known.of(last)
    assert len(known) == 4
