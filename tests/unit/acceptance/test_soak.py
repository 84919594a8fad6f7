"""The soak finds what it looks for."""

from __future__ import annotations

import pytest
from tests.acceptance.faults.crowd import Heard
from tests.soak.clients import Clients, kind_of
from tests.soak.requests import fixed_requests
from tests.soak.watch import Series

RIGHT = Heard(texts={0: "Paris"}, finishes={0: "stop"}, logprobs={0: [-0.5, -1.0]})


def counted(heard: Heard, *, explained: frozenset[str] = frozenset()) -> Clients:
    """Return clients that heard this instead of what is right."""
    clients = Clients("", [], [], set(explained))
    clients._count(fixed_requests()[0], heard, RIGHT)
    return clients


@pytest.mark.parametrize(
    "heard",
    [
        Heard(texts={0: "Pari"}, finishes={0: "stop"}, logprobs={0: [-0.5, -1.0]}),
        Heard(texts={0: "ParisParis"}, finishes={0: "stop"}, logprobs={0: [-0.5, -1.0]}),
        Heard(texts={0: "Paris"}, finishes={0: "length"}, logprobs={0: [-0.5, -1.0]}),
        Heard(texts={0: "Paris"}, finishes={}, logprobs={0: [-0.5, -1.0]}),
        Heard(texts={0: "Paris"}, finishes={0: "stop"}, logprobs={0: [-0.5]}),
        Heard(texts={0: "Paris"}, finishes={0: "stop"}, logprobs={0: [-0.5, -1.1]}),
        Heard(texts={0: "Paris"}, finishes={0: "stop"}),
        Heard(
            texts=RIGHT.texts, finishes=RIGHT.finishes, logprobs=RIGHT.logprobs, error="503 busy"
        ),
    ],
)
def test_an_answer_that_is_not_the_right_one_is_found(heard: Heard) -> None:
    assert counted(heard).tally.wrong


def test_rounding_is_no_fault_and_an_end_that_is_explained_neither() -> None:
    near = Heard(texts=RIGHT.texts, finishes=RIGHT.finishes, logprobs={0: [-0.5001, -1.0]})
    assert not counted(near).tally.wrong
    clients = counted(Heard(error="503 busy"), explained=frozenset({"503"}))
    assert not clients.tally.wrong
    assert clients.tally.ends == {"503": 1}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("ConnectError: refused", "cut"), ("RemoteProtocolError: peer closed", "cut"),
        ("429 b'{}'", "429"), ("{'message': 'x'}", "error in the stream"),
    ],
)  # fmt: skip
def test_ends_are_told_apart(error: str, kind: str) -> None:
    assert kind_of(error) == kind


def test_memory_that_grows_is_seen() -> None:
    seconds = [float(each) for each in range(0, 120, 2)]
    grows = Series(seconds, [100 + each / 10 for each in seconds], [7] * len(seconds))
    assert grows.slope() == pytest.approx(6.0)
    breathes = Series(seconds, [100 + each % 4 for each in seconds], [7] * len(seconds))
    assert abs(breathes.slope()) < 1.0
    assert Series([1.0], [5.0], [3]).slope() == 0.0
