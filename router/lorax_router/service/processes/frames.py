"""What crosses the pipes between the router and its limited processes.

A frame is a JSON document behind its length; ``blobs`` of it says how many bytes of
what is no JSON follow. Answers have none.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

Document = Mapping[str, Any]

_LENGTH = struct.Struct(">Q")


def pack(document: Document, blobs: Sequence[bytes] = ()) -> list[bytes]:
    """Return the pieces of a frame."""
    text = json.dumps({**document, "blobs": [len(blob) for blob in blobs]}).encode()
    return [_LENGTH.pack(len(text)) + text, *blobs]


def read(stream: BinaryIO) -> tuple[dict[str, Any], list[bytes]] | None:
    """Wait for a frame; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    document: dict[str, Any] = json.loads(stream.read(_LENGTH.unpack(head)[0]))
    blobs = [stream.read(size) for size in document.pop("blobs")]
    return document, blobs


async def receive(reader: asyncio.StreamReader, max_bytes: int) -> dict[str, Any]:
    """Wait for an answer; raises ValueError for one that is none, IncompleteReadError at the end."""
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > max_bytes:
        raise ValueError(f"an answer of {size} bytes")
    answer = json.loads(await reader.readexactly(size))
    if not isinstance(answer, dict):
        raise ValueError("an answer that is no object")
    return answer
