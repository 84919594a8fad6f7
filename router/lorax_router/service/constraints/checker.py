"""Checks in limited processes what outputs are to be bound to, before it gets near a batch.

Nearly all are checked in milliseconds. One that is not done in a short time is tried again in
another process, where only its like are: so those wait for each other and for nobody else.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import Any

from cachetools import LRUCache

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.errors import OverloadedError, ValidationError
from lorax_contract.words import counted
from lorax_router.service.processes.limited_process import LimitedProcess, ProcessLostError
from lorax_router.service.processes.nursery import Nursery
from lorax_router.service.processes.serving import Bounds
from lorax_router.service.prompts.overruns import Overruns
from lorax_router.service.single_flight import SingleFlight

logger = logging.getLogger(__name__)

_MODULE = "lorax_router.service.constraints.check_process"
# Each of a model's threads waits for the slowest one, so that whoever has a part of one core holds all
# of them up. Slow ones get a twentieth of one that is full: enough to be done within PATIENCE_S.
_NICE, _SLOW_NICE = 10, 13
# What an answer takes beside its text.
_BYTES_BESIDE = 500
_NAMES = {
    ConstraintKind.JSON_SCHEMA: "the JSON schema",
    ConstraintKind.REGEX: "the regular expression",
    ConstraintKind.LARK: "the grammar",
    ConstraintKind.CHOICE: "the list of choices",
    ConstraintKind.LLGUIDANCE: "the grammar",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckLimits:
    """What checking one constraint may take."""

    max_chars: int = 256 << 10
    # Seconds of computing. After the first it is tried again where slow ones are, with the second.
    quick_s: float = 0.25
    deadline_s: float = 5.0
    memory_bytes: int = 256 << 20
    # Of answers that are remembered.
    cache_bytes: int = 32 << 20
    max_waiting: int = 256


class _Lane:
    """One process, started when it is needed; questions wait for each other."""

    def __init__(self, nursery: Nursery, limits: CheckLimits, deadline_s: float, nice: int) -> None:
        self._nursery = nursery
        self._bounds = Bounds(memory_bytes=limits.memory_bytes, deadline_s=deadline_s, nice=nice)
        self._lock = asyncio.Lock()
        self._process: LimitedProcess | None = None

    async def ask(self, constraint: Constraint) -> dict[str, Any]:
        """Return the answer; raises ProcessLostError."""
        question = {
            "kind": constraint.kind.value,
            "text": constraint.text,
            "frame": constraint.frame,
        }
        async with self._lock:
            try:
                return await self._asked(question)
            except ProcessLostError as error:
                if not error.killed:
                    raise
            # It had to go for others: once more.
            return await self._asked(question)

    async def _asked(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._process is None or not self._process.is_alive:
            self._process = await self._nursery.start(self._bounds)
        answer = await self._process.ask(question, deadline_s=self._bounds.deadline_s)
        if "memory" in answer:
            # It gives none back.
            await self._process.end()
        return answer

    async def close(self) -> None:
        if self._process is not None:
            await self._process.end()


class ConstraintChecker:
    """Makes grammars of constraints, or says in words why none can be made.

    Answers are remembered, refusals among them. One that took too much time or memory is
    refused unchecked after the second time, for a while.

    Args:
        tokenizer_file: the model's tokenizer.
    """

    def __init__(self, tokenizer_file: str, limits: CheckLimits | None = None) -> None:
        self._limits = limits = limits or CheckLimits()
        self._nursery = Nursery(_MODULE, tokenizer_file)
        self._quick = _Lane(self._nursery, limits, limits.quick_s, _NICE)
        self._slow = _Lane(self._nursery, limits, limits.deadline_s, _SLOW_NICE)
        # A grammar, or why there is none.
        self._answers: LRUCache[str, tuple[str | None, str]] = LRUCache(
            self._limits.cache_bytes,
            getsizeof=lambda answer: _BYTES_BESIDE + len((answer[0] or answer[1]).encode()),
        )
        self._overruns = Overruns()
        self._checking: SingleFlight[tuple[str | None, str]] = SingleFlight()
        self._num_waiting = 0

    async def check(self, constraint: Constraint) -> Constraint:
        """Return the same as a grammar; raises ValidationError in words, OverloadedError."""
        name, limits = _NAMES[constraint.kind], self._limits
        num_chars = len(constraint.text) + len(constraint.frame)
        if num_chars > limits.max_chars:
            raise ValidationError(
                f"`{constraint.field_name}`: {name} has {num_chars} characters; "
                f"the limit is {limits.max_chars}"
            )
        key = constraint.key
        answer = self._answers.get(key)
        if answer is None:
            answer = await self._checking.do(key, lambda: self._checked(key, constraint))
        grammar, fault = answer
        if grammar is None:
            what = f"`{constraint.field_name}`: {name}"
            if constraint.frame:
                # If what is bound is fine by itself, the calls beside it are at fault.
                await self.check(replace(constraint, frame=""))
                what = f"`tools`: {_NAMES[ConstraintKind.LARK]} of their calls"
            # Why it cannot be used may be said in the client's own words, which are for no log.
            own = fault.partition(": ")[0]
            raise ValidationError(f"{what} {own}", public=f"{what} {fault}")
        return replace(constraint, kind=ConstraintKind.LLGUIDANCE, text=grammar, frame="")

    async def close(self) -> None:
        """End the processes."""
        await self._checking.close()
        await self._quick.close()
        await self._slow.close()
        await self._nursery.close()

    async def _checked(self, key: str, constraint: Constraint) -> tuple[str | None, str]:
        if seconds := self._overruns.refused_s(key):
            return None, (
                "took too much time or memory again and again; it is not tried for "
                f"{counted(seconds, 'second')}"
            )
        if self._num_waiting >= self._limits.max_waiting:
            raise OverloadedError("too many constraints wait to be checked", public="")
        self._num_waiting += 1
        try:
            answer = await self._asked(constraint)
        except ProcessLostError as error:
            self._overruns.note(key)
            logger.warning("a constraint ended the process that checks it: %s", error)
            too_long = f"takes longer than {self._limits.deadline_s:g} s to check"
            return None, too_long if error.overdue else "cannot be checked: it ends the checker"
        finally:
            self._num_waiting -= 1
        if "memory" in answer:
            self._overruns.note(key)
            return None, f"takes more than {self._limits.memory_bytes >> 20} MiB to check"
        found = answer.get("grammar"), f"cannot be used: {answer.get('refused')}"
        if _BYTES_BESIDE + len((found[0] or found[1]).encode()) <= self._answers.maxsize:
            self._answers[key] = found
        return found

    async def _asked(self, constraint: Constraint) -> dict[str, Any]:
        try:
            return await self._quick.ask(constraint)
        except ProcessLostError as error:
            if not error.overdue:
                raise
        return await self._slow.ask(constraint)
