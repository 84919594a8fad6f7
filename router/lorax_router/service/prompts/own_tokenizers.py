"""Adapters' own tokenizers, in limited processes.

A tokenizer is always asked in the same process, which reads it once, however many
requests come first, and keeps it within its bytes. One that takes too much time or
memory ends its process, and the next question starts another.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from lorax_contract.adapters import AdapterUnavailableError, Reason, refused
from lorax_contract.errors import OverloadedError, ValidationError
from lorax_contract.words import counted
from lorax_router.service.processes.limited_process import LimitedProcess, ProcessLostError
from lorax_router.service.processes.nursery import Nursery
from lorax_router.service.processes.serving import Bounds
from lorax_router.service.prompts.encoding import EncodedText, TextToEncode
from lorax_router.service.prompts.overruns import Overruns
from lorax_router.service.single_flight import SingleFlight

logger = logging.getLogger(__name__)

_MODULE = "lorax_router.service.prompts.encode_process"
# As a fetch does.
_NICE = 10
# Tokenizer files that are on their way or being read at the same time.
_NUM_READING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerLimits:
    """What tokenizers of adapters may take, in each process."""

    cache_bytes: int = 192 << 20
    # On top of the cache: reading one takes ten times its file and more for a while.
    reading_bytes: int = 448 << 20
    deadline_s: float = 20.0
    num_processes: int = 2
    max_waiting: int = 4096


class TokenizerProcess:
    """One process, started when it is needed; questions wait for each other."""

    def __init__(self, nursery: Nursery, limits: TokenizerLimits) -> None:
        self._nursery = nursery
        self._limits = limits
        self._bounds = Bounds(
            memory_bytes=limits.cache_bytes + limits.reading_bytes,
            deadline_s=limits.deadline_s,
            nice=_NICE,
        )
        self._process: LimitedProcess | None = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[dict[str, Any]]] = set()

    async def ask(self, question: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> dict[str, Any]:
        """Return the answer; raises ProcessLostError, OverloadedError.

        Goes on when the caller leaves: to end the process would cost others their tokenizers.
        """
        if len(self._tasks) >= self._limits.max_waiting:
            raise OverloadedError("too many texts wait for adapters' tokenizers", public="")
        task = asyncio.create_task(self._ask(question, blobs))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End the process."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            await self._process.end()

    def _ended(self, task: asyncio.Task[dict[str, Any]]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Whoever wanted it may have left.
            task.exception()

    async def _ask(self, question: Mapping[str, Any], blobs: Sequence[bytes]) -> dict[str, Any]:
        async with self._lock:
            try:
                return await self._asked(question, blobs)
            except ProcessLostError as error:
                if not error.killed:
                    raise
            return await self._asked(question, blobs)

    async def _asked(self, question: Mapping[str, Any], blobs: Sequence[bytes]) -> dict[str, Any]:
        if self._process is None or not self._process.is_alive:
            self._process = await self._nursery.start(self._bounds)
        answer = await self._process.ask(question, blobs, deadline_s=self._limits.deadline_s)
        if "memory" in answer:
            await self._process.end()
            raise ProcessLostError("for want of memory")
        return answer


class OwnTokenizers:
    """All adapters' own tokenizers.

    Args:
        read: returns the file of a key.
    """

    def __init__(
        self, read: Callable[[str], Awaitable[bytes]], limits: TokenizerLimits | None = None
    ) -> None:
        limits = limits or TokenizerLimits()
        self._read = read
        self._nursery = Nursery(_MODULE, str(limits.cache_bytes))
        self._processes = [
            TokenizerProcess(self._nursery, limits) for _ in range(limits.num_processes)
        ]
        self._overruns = Overruns()
        self._room = asyncio.Semaphore(_NUM_READING)
        self._reading: SingleFlight[None] = SingleFlight()

    def get(self, key: str, owner: str) -> OwnTokenizer:
        """Return a tokenizer as its owner's requests use it."""
        return OwnTokenizer(self, key, owner)

    async def ready(self, tokenizer: OwnTokenizer) -> None:
        """Have a tokenizer read before it is used; raises AdapterUnavailableError."""
        if "missing" in await self._asked(tokenizer, {"key": tokenizer.key}):
            await self._reading.do(tokenizer.key, partial(self._take, tokenizer))

    async def encode(self, tokenizer: OwnTokenizer, asked: TextToEncode) -> EncodedText:
        """Return the tokens of texts; raises AdapterUnavailableError, ValidationError."""
        question = {"key": tokenizer.key, **asdict(asked)}
        answer = await self._asked(tokenizer, question)
        if "missing" in answer:
            # So many are in use that they drive each other out: read and used in one, it is there.
            answer = await self._asked_with_file(tokenizer, question)
        if "failed" in answer:
            logger.warning("%s: a text cannot be tokenized: %s", tokenizer, answer["failed"])
            raise ValidationError("`inputs` cannot be tokenized by this adapter's tokenizer")
        spans = answer["spans"]
        return EncodedText(
            answer["ids"],
            answer["second_start"],
            None if spans is None else [(start, end) for start, end in spans],
        )

    async def close(self) -> None:
        """End the processes."""
        await self._reading.close()
        for process in self._processes:
            await process.close()
        await self._nursery.close()

    async def _take(self, tokenizer: OwnTokenizer) -> None:
        await self._asked_with_file(tokenizer, {"key": tokenizer.key})

    async def _asked_with_file(
        self, tokenizer: OwnTokenizer, question: Mapping[str, Any]
    ) -> dict[str, Any]:
        async with self._room:
            raw = await self._read(tokenizer.key)
            answer = await self._asked(tokenizer, question, [raw])
        if "refused" in answer:
            raise refused(f"{tokenizer} cannot be read: {answer['refused']}")
        return answer

    async def _asked(
        self, tokenizer: OwnTokenizer, question: Mapping[str, Any], blobs: Sequence[bytes] = ()
    ) -> dict[str, Any]:
        key = tokenizer.key
        if seconds := self._overruns.refused_s(key):
            raise refused(
                f"{tokenizer} took too much time or memory again and again; it is not used for "
                f"{counted(seconds, 'second')}"
            )
        process = self._processes[zlib.crc32(key.encode()) % len(self._processes)]
        try:
            return await process.ask(question, blobs)
        except ProcessLostError as error:
            self._overruns.note(key)
            how = "takes too long" if error.overdue else f"ends the process that uses it {error}"
            logger.warning("%s %s", tokenizer, how)
            raise AdapterUnavailableError(Reason.REFUSED, f"{tokenizer} {how}") from error


class OwnTokenizer:
    """One adapter's tokenizer."""

    def __init__(self, tokenizers: OwnTokenizers, key: str, owner: str) -> None:
        self.key = key
        self._tokenizers = tokenizers
        self._owner = owner

    def __str__(self) -> str:
        return f"the tokenizer of {self._owner}"

    async def encode(self, asked: TextToEncode) -> EncodedText:
        """Return the tokens of texts; raises AdapterUnavailableError, ValidationError."""
        return await self._tokenizers.encode(self, asked)
