"""Mutators of protobuf messages, by their descriptors, and of what they are on the wire."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

NAN, INF = float("nan"), float("inf")
_KINDS = FieldDescriptor
_FLOATS = (NAN, INF, -INF, 3e38, -3e38, -1.0, 0.0, 0.5, 1.0, 2.0, 1e-40)
_TEXTS = ("", "x", "w1", "w1 w2", "\x00\n", "é" * 2_000, "{", "[]", '{"type": "object"}', "(", "[ab]+", "a" * 300_000, "../x",
          "local", "hub", "user", "9" * 5_000, '{"a": ' * 900 + "1" + "}" * 900)  # fmt: skip
_ODD: dict[int, tuple[Any, ...]] = {
    _KINDS.TYPE_FLOAT: _FLOATS,
    _KINDS.TYPE_DOUBLE: (*_FLOATS, 1e308),
    _KINDS.TYPE_UINT32: (0, 1, 2, 3, 5, 17, 63, 64, 1_000, 2**16, 2**31 - 1, 2**31, 2**32 - 1),
    _KINDS.TYPE_UINT64: (0, 1, 2, 3, 5, 17, 1_000, 2**31, 2**63, 2**64 - 1),
    _KINDS.TYPE_INT32: (0, 1, 2, -1, 17, 1_000, 2**31 - 1, -(2**31)),
    _KINDS.TYPE_INT64: (0, 1, 2, -1, 17, 2**63 - 1, -(2**63)),
    _KINDS.TYPE_STRING: _TEXTS,
    _KINDS.TYPE_BYTES: (b"", b"x", b"\xff" * 9),
    _KINDS.TYPE_BOOL: (True, False),
    _KINDS.TYPE_ENUM: (0, 1, 2, 3, 4, 5, 99, -1),
}
for _signed in (_KINDS.TYPE_SINT32, _KINDS.TYPE_SFIXED32):
    _ODD[_signed] = _ODD[_KINDS.TYPE_INT32]
_MAX_DEPTH = 6


def copied(message: Message) -> Any:
    """Return the same message again."""
    made = type(message)()
    made.CopyFrom(message)
    return made


def parts(message: Message) -> Iterator[Message]:
    """Yield a message and all that are set in it."""
    waiting: list[Message] = [message]
    while waiting:
        node = waiting.pop()
        yield node
        for field, value in node.ListFields():
            if field.type != _KINDS.TYPE_MESSAGE:
                continue
            if field.message_type.GetOptions().map_entry:
                if field.message_type.fields_by_name["value"].message_type is not None:
                    waiting.extend(value.values())
            else:
                waiting.extend(value if field.is_repeated else [value])


def _a_part(draw: random.Random, message: Message) -> tuple[Message, Message]:
    """Return a copy, and one of the messages in it that has fields."""
    message = copied(message)
    return message, draw.choice(
        [each for each in parts(message) if each.DESCRIPTOR.fields] or [message]
    )


def fill(draw: random.Random, message: Message, field: FieldDescriptor, depth: int = 0) -> None:
    """Give a field some value, of its type; of a message all that is drawn."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        _fill_map(draw, getattr(message, field.name), field)
        return
    times = draw.choice([1, 1, 2, 3, 40]) if field.is_repeated else 1
    for _ in range(times if depth < 2 else 1):
        if field.type != _KINDS.TYPE_MESSAGE:
            _fill_scalar(draw, message, field)
            continue
        place = getattr(message, field.name)
        inner = place.add() if field.is_repeated else place
        inner.SetInParent()
        if depth < _MAX_DEPTH:
            for each in inner.DESCRIPTOR.fields:
                if draw.random() < 0.3:
                    fill(draw, inner, each, depth + 1)


def _fill_scalar(draw: random.Random, message: Message, field: FieldDescriptor) -> None:
    value = draw.choice(_ODD[field.type])
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


def _fill_map(draw: random.Random, place: Any, field: FieldDescriptor) -> None:
    kinds = field.message_type.fields_by_name
    key = draw.choice(_ODD[kinds["key"].type])
    if kinds["value"].message_type is not None:
        inner = place[key]
        inner.SetInParent()
        for each in inner.DESCRIPTOR.fields:
            if draw.random() < 0.3:
                fill(draw, inner, each, _MAX_DEPTH)
    else:
        place[key] = draw.choice(_ODD[kinds["value"].type])


def set_any(draw: random.Random, message: Message) -> Message:
    """Set a field to a value of its type that is odd."""
    message, part = _a_part(draw, message)
    if part.DESCRIPTOR.fields:
        fill(draw, part, draw.choice(part.DESCRIPTOR.fields))
    return message


def set_many(draw: random.Random, message: Message) -> Message:
    """Set some fields of one message."""
    message, part = _a_part(draw, message)
    for field in draw.sample(list(part.DESCRIPTOR.fields), min(4, len(part.DESCRIPTOR.fields))):
        fill(draw, part, field)
    return message


def clear(draw: random.Random, message: Message) -> Message:
    """Leave a field out that is set."""
    message, part = _a_part(draw, message)
    if found := part.ListFields():
        part.ClearField(draw.choice(found)[0].name)
    return message


def replace_number(draw: random.Random, message: Message) -> Message:
    """Change a number that is there, one of a list too, by little."""
    message = copied(message)
    found = [
        (part, field)
        for part in parts(message)
        for field, _ in part.ListFields()
        if field.type in (_KINDS.TYPE_UINT32, _KINDS.TYPE_UINT64, _KINDS.TYPE_INT32)
    ]
    if found:
        part, field = draw.choice(found)
        step = draw.choice([-1, 1, 2, 16])
        if field.is_repeated:
            values = getattr(part, field.name)
            place = draw.randrange(len(values))
            values[place] = max(0, min(values[place] + step, 2**31))
        else:
            setattr(part, field.name, max(0, min(getattr(part, field.name) + step, 2**31)))
    return message


def repeat(draw: random.Random, message: Message) -> Message:
    """Have what is in a list once more, often, or in another order."""
    message = copied(message)
    found = [
        getattr(part, field.name)
        for part in parts(message)
        for field, _ in part.ListFields()
        if field.is_repeated
        and not (field.message_type and field.message_type.GetOptions().map_entry)
    ]
    if found:
        values = draw.choice(found)
        again = list(values)[: draw.randint(1, len(values))]
        values.extend(again * draw.choice([1, 1, 2, 30]))
    return message


MESSAGE_MUTATORS = {
    each.__name__: each for each in (set_any, set_many, clear, replace_number, repeat)
}
