"""Every message between a front and the core, and how they become bytes and messages again.

``number`` is the front's own for one of its requests; all messages about it carry that. Messages
arrive in the order in which they were sent, which is part of what they mean: what the core tells
of a name's change reaches a front before the answer to any question that the front asks later.
"""

from __future__ import annotations

from typing import Any

import msgspec

from lorax_contract.adapters import AdapterRef
from lorax_contract.pooling import HeadFacts
from lorax_contract.step import Alternatives, TokenColumns
from lorax_router.fronts.core_facts import CoreFacts, CoreLoad
from lorax_router.fronts.faults import Fault
from lorax_router.fronts.values import PackedOpening, PackedRequest, PackedResult
from lorax_router.service.adapters.managed import ManagedChange, ManagedKnown, Stamp
from lorax_router.service.callers import Caller
from lorax_router.service.origin import Origin
from lorax_router.service.results import AdapterUse, Timings

# Raised when a message changes so that another version would misread it. A field that comes to its
# end with a default is none of that: who does not know it passes it over, or has the default. A
# message that is new is asked only of those that say that they take it (CoreFacts).
PROTOCOL = 1


class FromFront(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A message from a front to the core."""


class AskRoom(FromFront, frozen=True):
    """Whether a caller's request has a place; answered by TellRoom or TellFault."""

    number: int
    caller: Caller


class AskAnswer(FromFront, frozen=True):
    """A whole answer; answered by TellAnswer or TellFault."""

    number: int
    request: PackedRequest


class AskThrough(FromFront, frozen=True):
    """A whole answer through each of some adapters; answered by TellThrough or TellFault."""

    number: int
    # Names none.
    request: PackedRequest
    adapters: list[str]


class AskStream(FromFront, frozen=True):
    """A stream; answered by TellOpening and TellChunks, or at any time TellFault."""

    number: int
    request: PackedRequest


class AskCount(FromFront, frozen=True):
    """How many tokens a prompt has; answered by TellCount or TellFault."""

    number: int
    request: PackedRequest


class AskHead(FromFront, frozen=True):
    """Which head would classify a text; answered by TellHead or TellFault."""

    number: int
    request: PackedRequest


class AskCall(FromFront, frozen=True):
    """Any other call over HTTP; answered by TellCall or TellFault, perhaps after PullPart."""

    number: int
    method: str
    scheme: str
    http_version: str
    path: str
    raw_path: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    server: tuple[str, int | None] | None
    # When it counts as made, where it changes what is managed by hand; see call_stamp.
    stamp: Stamp | None = None


class CallPart(FromFront, frozen=True):
    """What a front received after PullPart: a part of the body, or that the client is gone."""

    number: int
    body: bytes
    has_more: bool
    is_gone: bool


class Withdraw(FromFront, frozen=True):
    """Nobody waits for a request any more."""

    number: int


class NoteRefused(FromFront, frozen=True):
    """A request ended before it came to the core; None: its client left."""

    fault: Fault | None
    caller: Caller
    origin: Origin


class NoteUnknownFields(FromFront, frozen=True):
    """A body had so many fields that nobody reads."""

    count: int


class NoteReady(FromFront, frozen=True):
    """The front takes connections."""


class NoteEnded(FromFront, frozen=True):
    """So many of the connections that the front was given have ended since it began."""

    count: int


class AskFacts(FromFront, frozen=True):
    """The first message of a front that another machine may have; answered by TellFacts."""

    # Which messages it knows; its name is for logs.
    protocol: int
    name: str


class AskLoad(FromFront, frozen=True):
    """How much the core has to do; answered by TellLoad."""

    number: int
    # What other cores gave tenants, as far as it is more than in the message before this one; see
    # ServiceElsewhere.
    elsewhere: dict[str, float] = {}
    # What was taken of tenants' quotas there, in the same way.
    taken_elsewhere: dict[str, float] = {}
    # What each tenant has waiting there, requests and tokens: all of it, each time.
    queued_elsewhere: dict[str, tuple[int, int]] = {}


class AskMessage(FromFront, frozen=True):
    """A call over gRPC that does not generate; answered by TellMessage or TellFault.

    Who calls is told by its metadata, of which those come whose names matter.
    """

    number: int
    method: str
    request: bytes
    metadata: list[tuple[str, str]]
    # As AskCall has it.
    stamp: Stamp | None = None


class AskManaged(FromFront, frozen=True):
    """What was managed by hand; answered by TellManaged or TellFault.

    The core takes over what it is told here: what names stand for before any message that follows,
    the rest beside the work that it has.
    """

    number: int
    changes: list[ManagedChange]
    # What was done before that Unix time is known to who asks.
    since: float = 0.0


class NotePreloads(FromFront, frozen=True):
    """Adapters that requests may come for, the likeliest first; see Preloader. Nothing is answered."""

    refs: list[AdapterRef]


class FromCore(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A message from the core to a front."""


class TellRoom(FromCore, frozen=True):
    """There is room for the request."""

    number: int


class TellFault(FromCore, frozen=True):
    """The request failed."""

    number: int
    fault: Fault


class TellAnswer(FromCore, frozen=True):
    """The whole answer."""

    number: int
    result: PackedResult


class TellThrough(FromCore, frozen=True):
    """The whole answers through adapters, and what is in the place of others; by their places."""

    number: int
    results: dict[int, PackedResult]
    faults: dict[int, Fault]


class TellCount(FromCore, frozen=True):
    """The number of a prompt's tokens."""

    number: int
    count: int


class TellHead(FromCore, frozen=True):
    """The head that would classify a text; None: there is none."""

    number: int
    head: HeadFacts | None


class TellAdapter(FromCore, frozen=True):
    """The adapter that a stream will use; comes before it is waited for."""

    number: int
    adapter: AdapterUse


class TellOpening(FromCore, frozen=True):
    """The stream is admitted."""

    number: int
    opening: PackedOpening


class StreamEnding(msgspec.Struct, frozen=True, array_like=True):
    """What is known of a stream when all its sequences have ended."""

    timings: Timings
    adapter: AdapterUse | None


class ChunkRest(msgspec.Struct, frozen=True, array_like=True):
    """What only some chunks have beside their tokens, by TokenChunk's names."""

    finish: int
    alternatives: list[Alternatives]
    generated_text: str | None
    prompt_tokens: TokenColumns | None
    prompt_alternatives: list[Alternatives]
    num_cached_tokens: int
    # In the last chunk of all sequences of a stream.
    ending: StreamEnding | None = None
    # Instead of tokens, where a vector was asked for.
    vector: bytes | None = None


class TellChunks(FromCore, frozen=True):
    """The chunks of one step, of all streams of a front: chunk i has the next ``counts[i]`` tokens.

    ``keys`` say of which sequence of which request each is (``key_of``). Without ``counts`` each
    has one token. ``rests`` is by the chunk's place.
    """

    keys: list[int]
    counts: list[int]
    ids: list[int]
    logprobs: list[float]
    texts: list[str]
    special: list[bool]
    rests: dict[int, ChunkRest]


class PullPart(FromCore, frozen=True):
    """The call waits for more of its body, or for its client to leave."""

    number: int


class TellCall(FromCore, frozen=True):
    """The response to a call."""

    number: int
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class TellMessage(FromCore, frozen=True):
    """The answer to a call over gRPC."""

    number: int
    answer: bytes


class TellManaged(FromCore, frozen=True):
    """What was managed by hand here."""

    number: int
    known: ManagedKnown


class TellAliases(FromCore, frozen=True):
    """Names of the operator's choosing that mean an adapter from now on, and such as do no more."""

    known: list[str]
    dropped: list[str]
    # What each that is known stands for, as ``place_key`` has it; a front does not ask for it.
    targets: list[str] = []


class TellFacts(FromCore, frozen=True):
    """What does not change of a core while it serves."""

    protocol: int
    facts: CoreFacts


class TellLoad(FromCore, frozen=True):
    """How much the core has to do."""

    number: int
    load: CoreLoad


class TellStop(FromCore, frozen=True):
    """No more connections come: the front ends once those it has are answered."""


Up = (
    AskRoom | AskAnswer | AskStream | AskCount | AskHead | AskCall | CallPart | Withdraw | NoteRefused
    | NoteUnknownFields | NoteReady | NoteEnded | AskFacts | AskLoad | AskMessage
    | AskManaged | NotePreloads | AskThrough
)  # fmt: skip
Down = (
    TellRoom | TellFault | TellAnswer | TellCount | TellHead | TellAdapter | TellOpening | TellChunks
    | PullPart | TellCall | TellAliases | TellStop | TellFacts | TellLoad | TellMessage
    | TellManaged | TellThrough
)  # fmt: skip

_SEQUENCE_BITS = 16
_SEQUENCE_MASK = (1 << _SEQUENCE_BITS) - 1

_encode = msgspec.msgpack.Encoder().encode
decode_up = msgspec.msgpack.Decoder(Up).decode
decode_down = msgspec.msgpack.Decoder(Down).decode


def encode(message: FromFront | FromCore) -> bytes:
    """Return the bytes of a message; text that is not valid Unicode is repaired, as JSON's is."""
    try:
        return _encode(message)
    except UnicodeEncodeError:
        return _encode(_repaired(msgspec.to_builtins(message, builtin_types=(bytes,))))


def _repaired(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_repaired(key): _repaired(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_repaired(each) for each in value]
    return value


def key_of(number: int, sequence: int) -> int:
    """Return the one number of a sequence of a request."""
    return number << _SEQUENCE_BITS | sequence


def of_key(key: int) -> tuple[int, int]:
    """Return the number of the request, and that of its sequence."""
    return key >> _SEQUENCE_BITS, key & _SEQUENCE_MASK
