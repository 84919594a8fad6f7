"""Chats of all kinds come out of real templates as transformers' apply_chat_template writes them."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from tests.helpers.chat_formats import CASES, FORMATS, SPECIAL_TOKENS, Case, own_template
from tests.helpers.in_loop import in_loop
from tests.helpers.inline_templates import InlineTemplates
from tests.helpers.tiny_tokenizers import byte_level

from lorax_contract.errors import TemplateError
from lorax_router.service.prompts.chat_renderers import ChatRenderers
from lorax_router.service.prompts.chat_template import ChatTemplate, template_of_files
from lorax_router.service.requests import ChatPrompt

NAMES = [*FORMATS, "own"]


def template_of(name: str) -> str:
    return own_template() if name == "own" else FORMATS[name]


@functools.cache
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), **SPECIAL_TOKENS)


def by_transformers(template: str, chat: ChatPrompt) -> str | None:
    """Return what transformers makes of a chat; None where it raises."""
    try:
        return str(
            tokenizer().apply_chat_template(
                [dict(message) for message in chat.messages],
                tools=chat.tools,
                documents=chat.documents,
                chat_template=template,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                tokenize=False,
                **chat.template_kwargs,
            )
        )
    except Exception:
        return None


async def by_us(template: str, chat: ChatPrompt) -> str | None:
    renderer = InlineTemplates(ChatTemplate(template, SPECIAL_TOKENS))
    try:
        return await renderer.render(chat)
    except TemplateError:
        return None


def test_there_are_forty_chats_and_most_are_rendered() -> None:
    assert len(CASES) >= 40
    for name in NAMES:
        rendered = [by_transformers(template_of(name), case.chat) for case in CASES]
        assert sum(text is not None for text in rendered) >= 20, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", NAMES)
@in_loop
async def test_a_chat_is_rendered_as_transformers_renders_it(name: str, case: Case) -> None:
    template = template_of(name)
    assert await by_us(template, case.chat) == by_transformers(template, case.chat)


async def assert_rendered(renderers: ChatRenderers, text: str, case: Case, **own: Any) -> None:
    expected = by_transformers(text, case.chat)
    if expected is not None:
        assert await renderers.render(case.chat, **own) == expected
    else:
        with pytest.raises(TemplateError):
            await renderers.render(case.chat, **own)


@in_loop
async def test_the_limited_process_renders_the_same() -> None:
    for name in NAMES:
        template = ChatTemplate(template_of(name), SPECIAL_TOKENS)
        renderers = ChatRenderers(template)
        try:
            for case in CASES[::5]:
                await assert_rendered(renderers, template.text, case)
        finally:
            await renderers.close()


@in_loop
async def test_an_adapters_own_template_is_rendered_as_transformers_renders_it() -> None:
    renderers = ChatRenderers(ChatTemplate("{{ raise_exception('the model is asked') }}"))
    try:
        for name in NAMES:
            files = {
                "chat_template.jinja": template_of(name).encode(),
                "tokenizer_config.json": json.dumps(SPECIAL_TOKENS).encode(),
            }
            own = template_of_files(files, "adapter a")
            for case in CASES:
                await assert_rendered(renderers, template_of(name), case, own=own)
    finally:
        await renderers.close()
    print(f"FIGURE {len(CASES)} chats by {len(NAMES)} templates, the model's and an adapter's own")
