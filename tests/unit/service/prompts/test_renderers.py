"""Templates in limited processes: what one of them takes is its own affair."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace

import psutil
import pytest
from tests.helpers.child_processes import running_children, running_forks
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_contract.errors import OverloadedError, TemplateError
from lorax_router.service.prompts import render_process
from lorax_router.service.prompts.chat_renderers import ChatRenderers
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.service.prompts.overruns import Overruns
from lorax_router.service.prompts.renderer_pool import RendererPool, RenderLimits
from lorax_router.service.requests import ChatPrompt

MIB = 1 << 20
PATIENT = RenderLimits(deadline_s=20.0, memory_bytes=64 * MIB, max_chars=1000)
HASTY = RenderLimits(deadline_s=1.0, gives_way_after_s=0.1, memory_bytes=64 * MIB, max_chars=1000)
FOLDED = "{{ 9**(9**9) }}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set x = namespace(t='a') %}{% for i in range(40) %}{% set x.t = x.t ~ x.t %}{% endfor %}"
)
GREEDY = "{% set x = 'a' * 1000000000 %}{{ x | length }}"


def own(text: str, owner: str = "adapter a") -> ChatTemplate:
    return ChatTemplate(text, {}, owner)


def processes() -> list[psutil.Process]:
    """Processes of renderers that this test started."""
    return running_forks("render_process")


@contextlib.asynccontextmanager
async def pool(
    limits: RenderLimits = PATIENT, num: int = 1, **options: object
) -> AsyncIterator[RendererPool]:
    made = RendererPool(limits, num, **options)
    try:
        yield made
    finally:
        await made.close()
        assert running_children("render_process") == []


@in_loop
async def test_a_text_comes_back_as_it_was_written() -> None:
    async with pool() as renderers:
        template = ChatTemplate("{{ bos_token }}{{ x }}", {"bos_token": "<s>"})
        for text in ("", "ü🙂\n\x00", "\ud800"):
            assert await renderers.render(template, {"x": text}) == f"<s>{text}"
        assert len(processes()) == 1


@pytest.mark.parametrize("text", [FOLDED, LOOPS])
@in_loop
async def test_an_endless_template_ends_at_its_deadline_and_harms_nobody(text: str) -> None:
    async with pool(HASTY, num=2, overruns=Overruns()) as renderers:
        endless = asyncio.create_task(renderers.render(own(text), {}))
        for number in range(20):
            other = own(f"{{{{ {number} }}}}", "adapter b")
            assert await renderers.render(other, {}) == str(number)
        with pytest.raises(TemplateError, match=r"of adapter a takes longer than 1 s"):
            await endless
        assert await renderers.render(own("{{ 1 }}"), {}) == "1"


@in_loop
async def test_one_template_occupies_one_process_however_often_it_is_asked_for() -> None:
    async with pool(PATIENT, num=2) as renderers:
        endless = [asyncio.create_task(renderers.render(own(LOOPS), {})) for _ in range(8)]
        await until(lambda: len(processes()) == 1)
        for number in range(20):
            assert await renderers.render(own(f"{{{{ {number} }}}}", "adapter b"), {}) != ""
        assert len(processes()) == 2
        for task in endless:
            task.cancel()
        await asyncio.gather(*endless, return_exceptions=True)


@pytest.mark.parametrize("text", [GREEDY, DOUBLING])
@in_loop
async def test_a_greedy_template_ends_at_its_memory_limit(text: str) -> None:
    async with pool() as renderers:
        with pytest.raises(TemplateError, match="of adapter a takes more than 64 MiB"):
            await renderers.render(own(text), {})
        assert processes() == []
        assert await renderers.render(own("{{ 1 }}"), {}) == "1"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ 'a' * 2000000 }}", "adapter a failed: it wrote more than 1000 characters"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "adapter a is not valid: it nests too"),
        ("{% if 1 %}" * 400 + "{% endif %}" * 400, "adapter a is not valid: "),
        ("{{ raise_exception('roles') }}", "adapter a failed: roles"),
        ("{% filter sort %}{% endfilter %}", "adapter a failed: it wrote a list where a text"),
        ("a" * (1 << 18) + "{{ 1 }}", "has 262151 characters; the limit is 262144"),
    ],
)
@in_loop
async def test_a_broken_template_says_so_and_its_process_lives_on(text: str, reason: str) -> None:
    async with pool() as renderers:
        assert await renderers.render(own("{{ 1 }}"), {}) == "1"
        (before,) = processes()
        with pytest.raises(TemplateError) as caught:
            await renderers.render(own(text), {})
        assert reason in caught.value.public
        assert processes() == [before]


@in_loop
async def test_who_runs_over_twice_is_not_rendered_for_a_while() -> None:
    now = [0.0]
    async with pool(HASTY, overruns=Overruns(lambda: now[0])) as renderers:
        waiting = [asyncio.create_task(renderers.render(own(FOLDED), {})) for _ in range(5)]
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        words = sorted(str(error) for error in errors)
        refused = "of adapter a took too much time or memory again and again"
        assert [refused in each for each in words] == [False, False, True, True, True]
        with pytest.raises(TemplateError, match="it is not rendered for 60 seconds"):
            await renderers.render(own(FOLDED), {})
        assert processes() == []
        assert await renderers.render(own("{{ 1 }}"), {}) == "1"
        now[0] = 61.0
        with pytest.raises(TemplateError, match="takes longer than"):
            await renderers.render(own(FOLDED), {})
        with pytest.raises(TemplateError, match="it is not rendered for 120 seconds"):
            await renderers.render(own(FOLDED), {})


def test_overruns_are_forgotten_after_a_while() -> None:
    now = [0.0]
    overruns = Overruns(lambda: now[0])
    for _ in range(9):
        overruns.note("a")
    assert overruns.refused_s("a") == 600
    assert overruns.refused_s("b") == 0
    now[0] = 1300.0
    overruns.note("a")
    assert overruns.refused_s("a") == 0


@in_loop
async def test_leaving_early_does_not_hide_an_overrun() -> None:
    overruns = Overruns()
    async with pool(HASTY, overruns=overruns) as renderers:
        template = own(FOLDED)
        for _ in range(2):
            task = asyncio.create_task(renderers.render(template, {}))
            await until(lambda: len(processes()) == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: not processes())
        await until(lambda: overruns.refused_s(template.key))


@in_loop
async def test_who_leaves_while_it_waits_is_never_rendered() -> None:
    async with pool(HASTY, overruns=Overruns()) as renderers:
        first = asyncio.create_task(renderers.render(own(LOOPS), {}))
        others = [asyncio.create_task(renderers.render(own(LOOPS), {})) for _ in range(3)]
        await until(lambda: len(processes()) == 1)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        with pytest.raises(TemplateError, match="takes longer"):
            await first
        # Two more would have run over and be refused by now.
        with pytest.raises(TemplateError, match="takes longer"):
            await renderers.render(own(LOOPS), {})


@in_loop
async def test_few_wait_behind_a_template_that_takes_long() -> None:
    limits = replace(PATIENT, deadline_s=2.0, refuses_after_s=0.3)
    async with pool(limits, num=2, overruns=Overruns()) as renderers:
        tasks = [asyncio.create_task(renderers.render(own(LOOPS), {})) for _ in range(100)]
        await until(lambda: sum(task.done() for task in tasks) == 91)
        errors = [task.exception() for task in tasks if task.done()]
        assert all(isinstance(error, OverloadedError) for error in errors)
        assert "adapter a takes long" in str(errors[0])
        # Those who came first are those who wait.
        assert not any(task.done() for task in tasks[:9])
        with pytest.raises(OverloadedError):
            await renderers.render(own(LOOPS), {})
        assert await renderers.render(own("{{ 1 }}", "adapter b"), {}) == "1"
        await asyncio.gather(*tasks, return_exceptions=True)


@in_loop
async def test_no_more_wait_than_may() -> None:
    async with pool(HASTY, max_waiting=2) as renderers:
        waiting = [asyncio.create_task(renderers.render(own(LOOPS), {})) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await renderers.render(own("{{ 1 }}"), {})
        await asyncio.gather(*waiting, return_exceptions=True)
        assert await renderers.render(own("{{ 1 }}"), {}) == "1"


@in_loop
async def test_a_long_render_gives_way_and_its_process_is_used_once() -> None:
    limits = RenderLimits(deadline_s=50.0, gives_way_after_s=0.1)
    async with pool(limits) as renderers:
        task = asyncio.create_task(renderers.render(own(LOOPS), {}))
        await until(processes)
        (process,) = processes()
        await until(lambda: os.sched_getscheduler(process.pid) == os.SCHED_IDLE)
        assert not task.done()
    async with pool(replace(limits, gives_way_after_s=0.0)) as renderers:
        assert await renderers.render(own("{{ 1 }}"), {}) == "1"
        assert processes() == []


@in_loop
async def test_a_process_that_is_killed_is_replaced() -> None:
    async with pool(overruns=Overruns()) as renderers:
        assert await renderers.render(own("{{ 1 }}"), {}) == "1"
        (process,) = processes()
        process.kill()
        assert await renderers.render(own("{{ 1 }}"), {}) == "1"
        assert len(processes()) == 1


@in_loop
async def test_a_template_whose_process_ends_is_told_so() -> None:
    async with pool(overruns=Overruns()) as renderers:
        task = asyncio.create_task(renderers.render(own(LOOPS), {}))
        for _ in range(2):
            await until(processes)
            (process,) = processes()
            # More than it takes to start.
            await until(lambda each=process: each.cpu_times().user > 0.4)
            process.kill()
            await until(lambda each=process: each not in processes())
        with pytest.raises(TemplateError, match="ends the process that renders it by SIGKILL"):
            await task


@in_loop
async def test_the_models_template_is_rendered_apart_from_adapters() -> None:
    base = ChatTemplate("base {{ messages[0].content }}")
    renderers = ChatRenderers(base, HASTY)
    hello = ChatPrompt(messages=[{"content": "hello"}])
    try:
        endless = [
            asyncio.create_task(renderers.render(hello, own(LOOPS + str(number))))
            for number in range(4)
        ]
        for _ in range(20):
            assert await renderers.render(hello) == "base hello"
            # A copy of the model's template is no template of its own.
            assert await renderers.render(hello, own(base.text)) == "base hello"
        errors = await asyncio.gather(*endless, return_exceptions=True)
        assert all("takes longer" in str(error) for error in errors)
        assert await renderers.render(hello, own("own {{ messages[0].content }}")) == "own hello"
    finally:
        await renderers.close()
    assert running_children("render_process") == []


@in_loop
async def test_a_model_without_a_template_says_so() -> None:
    renderers = ChatRenderers(None)
    with pytest.raises(TemplateError, match="no chat template"):
        await renderers.render(ChatPrompt(messages=[]))
    assert await renderers.render(ChatPrompt(messages=[]), own("{{ 1 }}")) == "1"
    await renderers.close()


@in_loop
async def test_what_a_template_says_of_messages_is_for_the_client_and_for_no_log() -> None:
    """Its words may quote them: `raise_exception` takes whatever the template gives it."""
    template = own("{{ raise_exception('cannot take ' + x) }}")
    async with pool() as renderers:
        with pytest.raises(TemplateError) as caught:
            await renderers.render(template, {"x": "zzcanaryzz"})
    assert "cannot take zzcanaryzz" in caught.value.public
    assert "zzcanaryzz" not in str(caught.value)


def test_an_error_that_nobody_thought_of_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise KeyError("inside")

    monkeypatch.setattr(render_process, "rendered", fail)
    question = {"text": "", "values": {}, "rules": {}, "max_chars": 1}
    assert render_process.answer(question, []) == {"failed": "KeyError"}
