"""What a target is: cases from a seed, and who judges them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

# Takes the content of a case and gives another one.
Mutator = Callable[[random.Random, Any], Any]

_MAX_SHOWN = 1_500
# How many cases are left as they are: they must serve.
_PLAIN_SHARE = 0.03
_RAW_SHARE = 0.3
_PATIENCE_S = 120.0


class FoundFaultError(Exception):
    """What came of a case is not what should; the text says why."""


@dataclass(slots=True)
class Case:
    """One input, and who made it what it is."""

    content: Any
    mutators: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        shown = repr(self.content)
        return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]} ... ({len(shown)})"


class Target(ABC):
    """Something that reads what strangers send.

    ``mutators`` change a content as it is made, ``raw_mutators`` as it is written: bytes.
    """

    name: str
    mutators: Mapping[str, Mutator]
    raw_mutators: Mapping[str, Mutator] = {}
    # Errors in the log that are as they should be: patterns of their texts.
    logged_errors: tuple[str, ...] = ()
    # So many cases share what is opened; a replay begins where it was opened.
    num_per_opening: int = 1000
    # Of processor time, for one case.
    most_cpu_s: float = 10.0

    @abstractmethod
    def plain(self, draw: random.Random) -> Any:
        """Return a content that serves."""

    @abstractmethod
    def judge(self, case: Case) -> str:
        """Give the input to its reader; return how it went, as ``taken`` or ``refused``.

        Raises FoundFaultError. Any other error is a finding, too.
        """

    def written(self, content: Any) -> Any:
        """Return a content with the bytes in it that ``raw_mutators`` change."""
        return content

    def open(self) -> None:  # noqa: B027 - most have nothing to start
        """Start what reads; called before the first case, and again after ``close``."""

    def close(self) -> None:  # noqa: B027
        """End it."""

    def make(self, seed: int, number: int) -> Case:
        """Return a case: what serves, and what up to four mutators make of it."""
        draw = random.Random(f"{self.name} {seed} {number}")
        case = Case(self.plain(draw))
        if draw.random() < _PLAIN_SHARE:
            case.content = self.written(case.content)
            return case
        is_raw = bool(self.raw_mutators) and draw.random() < _RAW_SHARE
        for name in draw.choices(sorted(self.mutators), k=draw.randint(1 - is_raw, 3)):
            # One that is too deep already stays as it is.
            with contextlib.suppress(RecursionError):
                case.content = self.mutators[name](draw, case.content)
                case.mutators.append(name)
        case.content = self.written(case.content)
        if is_raw:
            name = draw.choice(sorted(self.raw_mutators))
            case.content = self.raw_mutators[name](draw, case.content)
            case.mutators.append(name)
        return case


class LoopTarget(Target):
    """A target whose reader lives in an event loop."""

    _runner: asyncio.Runner
    _stack: contextlib.AsyncExitStack

    @abstractmethod
    async def opened(self, stack: contextlib.AsyncExitStack) -> None:
        """Start what reads; what must end enters ``stack``."""

    @abstractmethod
    async def judged(self, case: Case) -> str:
        """As ``judge``."""

    def open(self) -> None:
        """Start a loop and what lives in it."""
        self._runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()
        self._run(self.opened(self._stack))

    def close(self) -> None:
        """End what lives in the loop, and the loop."""
        self._run(self._stack.aclose())
        self._runner.close()

    def judge(self, case: Case) -> str:
        """Give the input to its reader within the loop."""
        return self._run(self.judged(case))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(asyncio.wait_for(work, _PATIENCE_S))


def require(holds: object, text: str) -> None:
    """Raise FoundFaultError unless something holds."""
    if not holds:
        raise FoundFaultError(text)


def require_words(text: str, most: int = 4_000) -> None:
    """Raise FoundFaultError for what is no sentence to a person."""
    require(text.strip(), "it is refused without a word")
    require(len(text) <= most, f"the refusal has {len(text)} characters: {text[:200]}")
