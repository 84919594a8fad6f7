"""The process that holds adapters' own tokenizers: ``python -m`` it with its bounds as JSON.

Reading a tokenizer keeps the interpreter for as long as it takes, up to a second, and takes
ten times its file; in the router all streams would wait for that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from cachetools import LRUCache
from tokenizers import Tokenizer

from lorax_router.service.processes.serving import nurse
from lorax_router.service.prompts.encoding import TextToEncode, encode

# A tokenizer takes 3 to 4.5 times its file (measured: 50,000 and 250,000 tokens, the file
# with and without line breaks), and remembers the words it has split.
_BYTES_PER_BYTE = 5
_BYTES_BESIDE = 4 << 20


class TokenizerCache:
    """Tokenizers by key, the least recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self._held: LRUCache[str, tuple[Tokenizer, int]] = LRUCache(
            max_bytes, getsizeof=lambda held: held[1]
        )

    def answer(self, question: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
        """Take a tokenizer in, return the ids of a text, or both in one; or say what is there.

        What goes wrong is ``missing``, ``refused`` (the tokenizer) or ``failed`` (the text).
        """
        if blobs:
            taken = self._take(question["key"], blobs[0])
            if "refused" in taken or "text" not in question:
                return taken
        held = self._held.get(question["key"])
        if held is None:
            return {"missing": True}
        if "text" not in question:
            return {}
        return _guarded("failed", lambda: _encode(held[0], question))

    def _take(self, key: str, raw: bytes) -> dict[str, Any]:
        num_bytes = _BYTES_PER_BYTE * len(raw) + _BYTES_BESIDE
        if num_bytes > self._held.maxsize:
            return {"refused": f"it has {len(raw)} bytes, more than are read"}
        # Before the new one is read: both would have to fit.
        while self._held.currsize + num_bytes > self._held.maxsize:
            self._held.popitem()
        return _guarded("refused", lambda: self._read(key, raw, num_bytes))

    def _read(self, key: str, raw: bytes, num_bytes: int) -> dict[str, Any]:
        tokenizer = Tokenizer.from_buffer(raw)
        # The file may bring settings of its training; lengths are the validator's affair.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._held[key] = tokenizer, num_bytes
        return {"taken": True}


def _encode(tokenizer: Tokenizer, question: dict[str, Any]) -> dict[str, Any]:
    asked = TextToEncode(**{each.name: question[each.name] for each in fields(TextToEncode)})
    return encode(tokenizer, asked)._asdict()


def _guarded(what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do ``work``; what the library raises, panics included, becomes an answer."""
    try:
        return work()
    except BaseException as error:  # noqa: BLE001
        return {what: f"{type(error).__name__}: {error}"[:300]}


def main() -> None:
    """Serve until the router leaves."""
    nurse(TokenizerCache(int(sys.argv[1])).answer)


if __name__ == "__main__":
    main()
