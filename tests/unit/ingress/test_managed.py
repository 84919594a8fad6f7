"""What an ingress keeps of what was managed by hand, for replicas that come later."""

from __future__ import annotations

from lorax_contract.adapters import AdapterRef
from lorax_ingress.managed import ManagedBook
from lorax_router.service.adapters.managed import ManagedAdapters, ManagedName, TakenBack
from lorax_router.service.adapters.registry import Pin

NOTHING = ManagedAdapters()


def name(text: str, created_at: float, adapter: str = "org/poet") -> ManagedName:
    return ManagedName(text, AdapterRef.of("hub", adapter), created_at, is_private=False)


def ref(number: int) -> AdapterRef:
    return AdapterRef.of("hub", f"org/{number}")


def test_what_a_call_adds_is_kept_and_what_it_takes_back_is_not() -> None:
    book = ManagedBook()
    pin = Pin(ref(1), "acme", is_private=False)
    full = ManagedAdapters((name("poet", 1.0),), (pin,), (ref(2),))
    assert book.changed(NOTHING, full)
    assert book.all() == full
    # A pin that becomes a load, and a name that stands for something else.
    other = ManagedAdapters((name("poet", 2.0, "org/pirate"),), (), (ref(2), ref(1)))
    assert book.changed(full, other)
    assert book.all() == other
    assert not book.changed(other, NOTHING)
    assert book.all() == NOTHING


def test_what_other_calls_added_meanwhile_stays() -> None:
    book = ManagedBook()
    book.changed(NOTHING, ManagedAdapters(loads=(ref(1),)))
    assert not book.changed(ManagedAdapters(loads=(ref(2),)), ManagedAdapters(loads=(ref(2),)))
    assert book.all().loads == (ref(1),)


def test_replicas_that_are_attached_tell_what_they_have() -> None:
    """As after the ingress began anew; of two names the younger one is believed."""
    book = ManagedBook()
    book.told(ManagedAdapters((name("poet", 5.0),), (), (ref(1),)))
    book.told(ManagedAdapters((name("poet", 3.0, "org/old"), name("bard", 1.0)), (), (ref(2),)))
    told = book.all()
    assert {each.name: each.ref.id for each in told.names} == {
        "poet": "org/poet",
        "bard": "org/poet",
    }
    assert told.loads == (ref(1), ref(2))


def test_one_that_was_away_does_not_bring_back_what_was_taken_back() -> None:
    book = ManagedBook()
    pin = Pin(ref(1), "", is_private=False)
    full = ManagedAdapters((name("poet", 1.0),), (pin,), (ref(2),))
    book.changed(full, NOTHING)
    book.told(full)
    assert book.all() == NOTHING
    # Given again it is there, though it has the same words.
    again = ManagedAdapters((name("poet", 2.0),), (pin,), (ref(2),))
    book.changed(NOTHING, again)
    assert book.all() == again
    book.changed(again, NOTHING)
    book.told(full)
    assert book.all() == NOTHING


def test_only_so_much_is_kept() -> None:
    book = ManagedBook(max_kept=3)
    for number in range(10):
        pin = Pin(ref(number), "", is_private=False)
        book.told(ManagedAdapters((name(f"{number}", 1.0),), (pin,), (ref(number),)))
    kept = book.all()
    assert [each.name for each in kept.names] == ["7", "8", "9"]
    assert [each.ref for each in kept.pins] == [ref(7), ref(8), ref(9)] == [*kept.loads]
    for number in range(10):
        book.changed(ManagedAdapters(loads=(ref(number),)), NOTHING)
    assert len(book._gone) == 3


def test_a_replica_is_told_what_was_taken_back_while_it_was_away() -> None:
    book = ManagedBook(max_kept=3)
    pin = Pin(ref(1), "acme", is_private=False)
    book.changed(ManagedAdapters(loads=(ref(3),)), NOTHING)
    book.left("a")
    assert book.gone_for("a") == TakenBack()
    full = ManagedAdapters((name("poet", 1.0),), (pin,))
    book.changed(full, NOTHING)
    assert book.gone_for("a") == TakenBack({"poet": 1.0}, (pin,))
    # One that was never here may have anything.
    assert book.gone_for("b") == TakenBack({"poet": 1.0}, (pin,), (ref(3),))
    book.left("a")
    assert book.gone_for("a") == TakenBack()
    # A name that is taken back again is gone since then.
    book.changed(NOTHING, ManagedAdapters((name("poet", 2.0),)))
    book.changed(ManagedAdapters((name("poet", 2.0),)), NOTHING)
    assert book.gone_for("a") == TakenBack({"poet": 2.0})
    # What was given again is not gone.
    book.changed(NOTHING, ManagedAdapters((), (pin,)))
    assert book.gone_for("b") == TakenBack({"poet": 2.0}, (), (ref(3),))
    for number in range(10):
        book.changed(ManagedAdapters(loads=(ref(number),)), NOTHING)
    assert len(book.gone_for("b").loads) <= 3
