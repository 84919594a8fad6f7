"""A few limited processes that render chat templates, shared fairly.

A template may take some of them only, so one that takes long leaves the others to others. A render that takes longer than most computes only where nobody else
does; one that passes its deadline or its memory ends with its process, and the next
question starts another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lorax_contract.errors import LoraxError, OverloadedError, TemplateError
from lorax_contract.words import counted
from lorax_router.service.processes.limited_process import LimitedProcess, ProcessLostError
from lorax_router.service.processes.nursery import Nursery
from lorax_router.service.processes.serving import Bounds
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.service.prompts.overruns import Overruns

logger = logging.getLogger(__name__)

_MODULE = "lorax_router.service.prompts.render_process"
_MAX_TEMPLATE_CHARS = 1 << 18
_MAX_BEHIND_SLOW = 8
_NICE = 10
_NO_RULES: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What one render may take; seconds are those of computing."""

    deadline_s: float = 3.0
    # After that it computes where nobody else does: templates of people take milliseconds.
    gives_way_after_s: float | None = 0.2
    # After that few wait for it: the others hold places that everybody needs.
    refuses_after_s: float = 1.0
    memory_bytes: int = 256 << 20
    max_chars: int = 4 << 20


@dataclass(slots=True, eq=False)
class _Render:
    """One render."""

    template: ChatTemplate
    values: Mapping[str, Any]
    rules: Mapping[str, Any]
    task: asyncio.Task[str] | None = None
    is_running: bool = False
    is_refused: bool = False

    def refuse(self) -> None:
        """End its waiting."""
        self.is_refused = True
        if self.task is not None:
            self.task.cancel()


@dataclass(slots=True, eq=False)
class _Turn:
    """Those who want the same template."""

    at_once: asyncio.Semaphore
    # In the order of their coming.
    waiting: list[_Render] = field(default_factory=list)
    num_inside: int = 0
    is_slow: bool = False

    def note_slow(self) -> None:
        """Take in that a render takes long: nearly all who wait need not."""
        self.is_slow = True
        for job in self.waiting[_MAX_BEHIND_SLOW:]:
            job.refuse()


class RendererPool:
    """Renders templates in ``num_processes`` limited processes, started when they are needed.

    Args:
        num_per_template: how many of them may render the same template.
        max_waiting: renders that wait or run; further ones are refused.
        overruns: which templates are refused unrendered; None: none, whatever they take.
    """

    def __init__(
        self,
        limits: RenderLimits,
        num_processes: int,
        *,
        num_per_template: int = 1,
        overruns: Overruns | None = None,
        max_waiting: int = 4096,
    ) -> None:
        self._limits = limits
        self._num_per_template = num_per_template
        self._overruns = overruns
        self._max_waiting = max_waiting
        # Those that give way later begin so: starting one again and again is work, too.
        nice = 0 if limits.gives_way_after_s is None else _NICE
        bounds = Bounds(memory_bytes=limits.memory_bytes, deadline_s=limits.deadline_s, nice=nice)
        self._bounds = bounds
        self._nursery = Nursery(_MODULE)
        self._room = asyncio.Semaphore(num_processes)
        # All that may be alive, and of them those that nobody asks.
        self._processes: set[LimitedProcess] = set()
        self._idle: list[LimitedProcess] = []
        self._turns: dict[str, _Turn] = {}
        self._tasks: set[asyncio.Task[str]] = set()

    async def render(
        self,
        template: ChatTemplate,
        values: Mapping[str, Any],
        rules: Mapping[str, Any] = _NO_RULES,
    ) -> str:
        """Return what a template makes of values, by the rules of ``render_process.rendered``.

        Raises TemplateError in words, OverloadedError when too many wait. A caller that leaves
        while it waits is forgotten; what is under way goes on and counts.
        """
        if template.num_chars > _MAX_TEMPLATE_CHARS:
            raise TemplateError(
                f"the chat template of {template.owner} has {template.num_chars} characters; "
                f"the limit is {_MAX_TEMPLATE_CHARS}"
            )
        self._check(template)
        if len(self._tasks) >= self._max_waiting:
            raise OverloadedError("too many chat templates wait to be rendered", public="")
        job = _Render(template, values, rules)
        task = job.task = asyncio.create_task(self._in_turn(job))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not job.is_running:
                task.cancel()
            raise

    async def warm_up(self) -> None:
        """Start a process before anybody asks; one that does not start is tried again then."""
        try:
            async with self._room:
                self._idle.append(await self._new_process())
        except LoraxError as error:
            logger.warning("%s", error)

    async def close(self) -> None:
        """End all renders and all processes."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._idle.clear()
        for process in self._processes:
            await process.end()
        await self._nursery.close()

    def _ended(self, task: asyncio.Task[str]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Whoever wanted it may have left.
            task.exception()

    def _check(self, template: ChatTemplate) -> None:
        if self._overruns is None:
            return
        if seconds := self._overruns.refused_s(template.key):
            raise TemplateError(
                f"the chat template of {template.owner} took too much time or memory again and "
                f"again; it is not rendered for {counted(seconds, 'second')}"
            )

    async def _in_turn(self, job: _Render) -> str:
        """Wait until others of the same template are done and a process is free; then render."""
        key = job.template.key
        turn = self._turns.setdefault(key, _Turn(asyncio.Semaphore(self._num_per_template)))
        turn.num_inside += 1
        try:
            await self._wait(job, turn)
            try:
                # Others of the same template may have run over meanwhile.
                self._check(job.template)
                async with self._room:
                    job.is_running = True
                    return await self._rendered(job, turn)
            finally:
                turn.at_once.release()
        finally:
            turn.num_inside -= 1
            if not turn.num_inside:
                del self._turns[key]

    async def _wait(self, job: _Render, turn: _Turn) -> None:
        busy = OverloadedError(
            f"the chat template of {job.template.owner} takes long and others wait for it already; "
            "try again later"
        )
        if turn.is_slow and len(turn.waiting) >= _MAX_BEHIND_SLOW:
            raise busy
        turn.waiting.append(job)
        try:
            await turn.at_once.acquire()
        except asyncio.CancelledError:
            if job.is_refused:
                raise busy from None
            raise
        finally:
            turn.waiting.remove(job)

    async def _rendered(self, job: _Render, turn: _Turn) -> str:
        try:
            process, answer = await self._answered(job, turn)
        except ProcessLostError as error:
            longer = f"takes longer than {self._limits.deadline_s:g} s"
            how = longer if error.overdue else f"ends the process that renders it {error}"
            raise self._over(job.template, how) from error
        if "memory" in answer or process.gave_way:
            # It gives back neither memory nor its old rank.
            await process.end()
        else:
            self._idle.append(process)
        if "memory" in answer:
            raise self._over(job.template, f"takes more than {self._limits.memory_bytes >> 20} MiB")
        return _text_of(answer, job.template.owner)

    async def _answered(self, job: _Render, turn: _Turn) -> tuple[LimitedProcess, dict[str, Any]]:
        process = await self._process()
        try:
            return process, await self._ask(process, job, turn)
        except ProcessLostError as error:
            if not error.killed:
                raise
        process = await self._new_process()
        return process, await self._ask(process, job, turn)

    async def _process(self) -> LimitedProcess:
        """Return a process that nobody asks."""
        while self._idle:
            if (process := self._idle.pop()).is_alive:
                return process
        return await self._new_process()

    async def _new_process(self) -> LimitedProcess:
        process = await self._nursery.start(self._bounds)
        self._processes = {each for each in self._processes if each.is_alive} | {process}
        return process

    async def _ask(self, process: LimitedProcess, job: _Render, turn: _Turn) -> dict[str, Any]:
        limits = self._limits
        question = {
            "text": job.template.text,
            # As transformers has it: a value of the request's wins over a special token.
            "values": {**job.template.special_tokens, **job.values},
            "rules": dict(job.rules),
            "max_chars": limits.max_chars,
        }
        timers = [process.after_computing(limits.refuses_after_s, turn.note_slow)]
        if limits.gives_way_after_s is not None:
            timers.append(process.after_computing(limits.gives_way_after_s, process.give_way))
        try:
            return await process.ask(question, deadline_s=limits.deadline_s)
        finally:
            turn.is_slow = False
            for timer in timers:
                timer.close()

    def _over(self, template: ChatTemplate, why: str) -> TemplateError:
        if self._overruns is not None:
            self._overruns.note(template.key)
        logger.warning("the chat template of %s %s", template.owner, why)
        return TemplateError(f"the chat template of {template.owner} {why}")


def _text_of(answer: Mapping[str, Any], owner: str) -> str:
    """Return the text of an answer; raises TemplateError for one that has none."""
    if "text" in answer:
        return str(answer["text"])
    if "invalid" in answer:
        raise TemplateError(f"the chat template of {owner} is not valid: {answer['invalid']}")
    what = f"the chat template of {owner} failed"
    if "long" in answer:
        raise TemplateError(f"{what}: {answer['long']}")
    # Its own words may quote the messages, which are for no log.
    raise TemplateError(what, public=f"{what}: {answer.get('failed')}")
