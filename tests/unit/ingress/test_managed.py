"""What an ingress keeps of what was managed by hand, for replicas that come later."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

from lorax_contract.adapters import ALIAS_SOURCE, AdapterRef
from lorax_ingress.managed import ManagedBook
from lorax_router.service.adapters.managed import ManagedChange, ManagedKind


def name(text: str, at: float, adapter: str = "org/poet", *, holds: bool = True) -> ManagedChange:
    target = AdapterRef.of("hub", adapter)
    ref = AdapterRef(source=ALIAS_SOURCE, id=text)
    return ManagedChange(kind=ManagedKind.NAME, ref=ref, at=at, target=target, holds=holds)


def load(number: int, at: float, *, holds: bool = True) -> ManagedChange:
    ref = AdapterRef.of("hub", f"org/{number}")
    return ManagedChange(kind=ManagedKind.LOAD, ref=ref, at=at, holds=holds)


def test_the_later_of_two_is_true_in_whichever_order_they_come() -> None:
    changes = [load(1, 10.0), load(1, 20.0, holds=False), load(1, 30.0)]
    for order in permutations(changes):
        book = ManagedBook()
        for each in order:
            book.told([each])
        assert book.all() == [changes[2]]


def test_what_others_may_not_know_is_told() -> None:
    book = ManagedBook()
    assert book.told([load(1, 10.0), name("poet", 10.0)]) == [load(1, 10.0), name("poet", 10.0)]
    # The same call at another replica.
    assert book.told([load(1, 10.5), name("poet", 10.0)]) == []
    assert book.all() == [load(1, 10.5), name("poet", 10.0)]
    # Another call that did the same, one that took it back, a name that stands for another one.
    again, gone, other = load(1, 60.0), load(1, 61.0, holds=False), name("poet", 11.0, "org/monk")
    for each in (again, gone, other):
        assert book.told([each]) == [each]
    # What was away is behind.
    assert book.told([load(1, 10.0), name("poet", 10.0)]) == []


def test_pins_of_tenants_are_told_apart() -> None:
    pins = [replace(load(1, 1.0), kind=ManagedKind.PIN, tenant=each) for each in ("", "acme")]
    book = ManagedBook()
    book.told([*pins, replace(pins[1], at=2.0, holds=False)])
    assert [each.holds for each in book.all()] == [True, False]


def test_only_so_much_is_kept_and_what_was_taken_back_first_goes_first() -> None:
    book = ManagedBook(max_kept=4)
    book.told([load(1, 1.0), load(2, 2.0), load(3, 3.0, holds=False), load(4, 4.0, holds=False)])
    book.told([load(5, 5.0)])
    assert [each.at for each in book.all()] == [1.0, 2.0, 4.0, 5.0]
    book.told([load(number, float(number)) for number in range(6, 9)])
    assert [each.at for each in book.all()] == [5.0, 6.0, 7.0, 8.0]
