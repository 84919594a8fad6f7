"""What was managed by hand is the same for all who were told of it, in whichever order that came."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.single_writer import Held, held_of, single_writer

from lorax_contract.adapters import ALIAS_SOURCE, AdapterRef
from lorax_router.service.adapters.managed import (
    ManagedChange,
    ManagedKind,
    ManagedRecord,
    Stamp,
    Taken,
)
from lorax_router.service.adapters.registry import Remembered

REFS = {
    "bard": AdapterRef(source=ALIAS_SOURCE, id="bard"), "poet": AdapterRef.of("hub", "org/poet"),
}  # fmt: skip
TARGETS = [AdapterRef.of("hub", f"org/{each}") for each in ("monk", "nun")]
INGRESSES = ("x", "y", "z")
NUM_REPLICAS = 3


def change(kind: ManagedKind, at: float, by: str = "x", **facts: Any) -> ManagedChange:
    values = {"ref": REFS["poet"], **facts}
    return ManagedChange(kind=kind, stamp=Stamp(at, by), **values)


@st.composite
def changes(draw: st.DrawFn) -> ManagedChange:
    kind = draw(st.sampled_from(ManagedKind))
    is_name = kind is ManagedKind.NAME
    is_pin = kind in (ManagedKind.PIN, ManagedKind.UNPIN)
    return change(
        kind,
        # Few times: ingresses that do something in the same moment.
        float(draw(st.integers(1, 6))),
        draw(st.sampled_from(INGRESSES)),
        ref=REFS["bard"] if is_name else draw(st.sampled_from([*REFS.values()])),
        tenant=draw(st.sampled_from(["", "acme"])) if is_pin else "",
        target=draw(st.sampled_from(TARGETS)) if is_name else None,
    )


# No ingress gives two calls one stamp.
HISTORIES = st.lists(changes(), min_size=1, max_size=12, unique_by=lambda each: each.stamp)


class Replica:
    """Knows what it was told, and has done what is new of it as a server does."""

    def __init__(self) -> None:
        self.record = ManagedRecord()
        self.done = Held()

    def hear(self, changes: list[ManagedChange]) -> Taken:
        taken = self.record.take(changes)
        for each in taken.over:
            if each.kind is ManagedKind.PIN:
                self.done.pins.discard((each.ref, each.tenant))
        for each in taken.news:
            if each.kind is ManagedKind.UNLOAD:
                self._unload(each.ref)
            elif each.kind is not ManagedKind.UNPIN:
                self.done.do(each)
        return taken

    def _unload(self, ref: AdapterRef) -> None:
        """What a later call gave stays."""
        if not self.record.holds(ManagedKind.LOAD, ref):
            self.done.loads.discard(ref)
        if not self.record.holds(ManagedKind.NAME, ref):
            self.done.names.pop(ref.id, None)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_replicas_know_the_same_whatever_the_order_and_as_a_single_writer_would(
    data: st.DataObject,
) -> None:
    """Of what three ingresses did; some comes twice, and one replica was away for a part of it."""
    history = data.draw(HISTORIES)
    replicas = [Replica() for _ in range(NUM_REPLICAS)]
    for replica in replicas:
        repeats = data.draw(st.lists(st.sampled_from(history), max_size=4))
        for each in data.draw(st.permutations([*history, *repeats])):
            replica.hear([each])
    away = Replica()
    missed = data.draw(st.sets(st.sampled_from(history)))
    for each in data.draw(st.permutations(history)):
        if each not in missed:
            away.hear([each])
    away.hear(replicas[0].record.all())
    wanted = single_writer(history)
    for replica in (*replicas, away):
        assert held_of(Remembered.of(replica.record.all())) == wanted
        assert replica.done == wanted
        assert replica.record.all() == replicas[0].record.all()
        assert replica.record.digest == replicas[0].record.digest


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_parts_that_tell_each_other_come_to_know_the_whole(data: st.DataObject) -> None:
    """An ingress that tells each what the others know, though each was told of some calls only."""
    history = data.draw(HISTORIES)
    replicas = [Replica() for _ in range(NUM_REPLICAS)]
    for each in history:
        for replica in data.draw(st.sets(st.sampled_from(replicas), min_size=1)):
            replica.hear([each])
    ingress = ManagedRecord()
    for replica in replicas:
        ingress.take(replica.record.all())
    for replica in replicas:
        replica.hear(ingress.all())
        assert held_of(Remembered.of(replica.record.all())) == single_writer(history)
        assert replica.record.digest == ingress.digest


@settings(max_examples=200, deadline=None)
@given(HISTORIES)
def test_records_that_differ_have_other_digests(history: list[ManagedChange]) -> None:
    record, digests = ManagedRecord(), {0: [[]]}
    for each in history:
        record.take([each])
        digests.setdefault(record.digest, []).append(record.all())
    assert all(each == known[0] for known in digests.values() for each in known)


def test_the_later_of_two_is_true_in_whichever_order_they_come() -> None:
    told = [
        change(ManagedKind.LOAD, 10.0), change(ManagedKind.UNLOAD, 20.0),
        change(ManagedKind.LOAD, 30.0),
    ]  # fmt: skip
    for order in permutations(told):
        record = ManagedRecord()
        for each in order:
            record.take([each])
        assert record.all() == [told[1], told[2]]
        assert record.holds(ManagedKind.LOAD, REFS["poet"])


def test_of_two_in_one_moment_the_same_one_is_later_for_all() -> None:
    load, unload = change(ManagedKind.LOAD, 1.0, "x"), change(ManagedKind.UNLOAD, 1.0, "y")
    for order in permutations([load, unload]):
        record = ManagedRecord()
        assert unload in record.take(order).news
        assert record.all() == [unload]
        assert record.is_taken_back(load)


def test_what_is_new_is_said_once() -> None:
    record = ManagedRecord()
    load = change(ManagedKind.LOAD, 10.0)
    assert record.take([load]).news == [load]
    assert record.take([load]).news == []
    assert record.take([replace(load, stamp=Stamp(5.0))]).news == []


def test_what_is_unloaded_nobody_keeps_who_pinned_it_before() -> None:
    record = ManagedRecord()
    own = change(ManagedKind.PIN, 10.0, tenant="acme")
    later = change(ManagedKind.PIN, 30.0)
    record.take([own, later])
    gone = change(ManagedKind.UNLOAD, 20.0)
    taken = record.take([gone])
    assert (taken.news, taken.over) == ([gone], [own])
    assert record.holds(*later.key)
    # Of one that nobody made by hand nothing is over: it is there because the options want it.
    assert record.take([change(ManagedKind.UNPIN, 25.0)]).over == []


def test_only_so_much_is_kept_the_latest() -> None:
    def of(kind: ManagedKind, number: int) -> ManagedChange:
        return change(kind, float(number), ref=AdapterRef.of("hub", f"org/{number}"))

    record = ManagedRecord(max_loads=2, max_past=3)
    record.take([of(ManagedKind.LOAD, number) for number in (1, 2, 3)])
    past = (ManagedKind.UNLOAD, ManagedKind.RELOAD, ManagedKind.UNPIN, ManagedKind.UNLOAD)
    record.take([of(kind, number) for number, kind in enumerate(past, 4)])
    assert [each.stamp.at for each in record.all()] == [2.0, 3.0, 5.0, 6.0, 7.0]
    old = of(ManagedKind.LOAD, 1)
    taken = record.take([old])
    assert taken.news == []
    assert old.ref in taken.refs
    assert record.latest == 7.0


def test_whoever_may_keep_few_keeps_the_same_whatever_came_first() -> None:
    told = [
        change(ManagedKind.LOAD, 1.0, ref=AdapterRef.of("hub", f"org/{each}")) for each in "abcd"
    ]
    kept = []
    for order in permutations(told):
        record = ManagedRecord(max_loads=2)
        for each in order:
            record.take([each])
        kept.append(record.all())
    assert len(kept[0]) == 2
    assert all(each == kept[0] for each in kept)
