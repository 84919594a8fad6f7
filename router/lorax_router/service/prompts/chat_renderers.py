"""Renders chats by the model's template or by an adapter's, each apart from the other."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from lorax_contract.errors import TemplateError, ValidationError
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.service.prompts.content_format import ContentFormat
from lorax_router.service.prompts.overruns import Overruns
from lorax_router.service.prompts.renderer_pool import RendererPool, RenderLimits
from lorax_router.service.requests import ChatPrompt

# Processes at most; they start when there is something to do.
_NUM_BASE = 2
_NUM_ADAPTERS = 2


# What a chat has fields for; template_kwargs may have any other name, those of special tokens
# included, as transformers has it.
_FIELDS = frozenset({
    "messages", "conversation", "tools", "documents", "add_generation_prompt",
    "continue_final_message", "chat_template", "tokenize",
})  # fmt: skip


def check_chat(chat: ChatPrompt) -> None:
    """Raise ValidationError for a chat that contradicts itself."""
    if foreign := sorted(_FIELDS & chat.template_kwargs.keys()):
        raise ValidationError(
            f"`template_kwargs` must not have `{foreign[0]}`, which is not for the template alone"
        )
    if chat.continue_final_message and chat.add_generation_prompt:
        raise ValidationError(
            "`continue_final_message` and `add_generation_prompt` exclude each other: the output "
            "either goes on with the last message or begins one"
        )


def values_of(chat: ChatPrompt) -> dict[str, Any]:
    """What a template is given of a chat."""
    return {
        **chat.template_kwargs,
        "messages": list(chat.messages),
        "tools": chat.tools,
        "documents": chat.documents,
        "add_generation_prompt": chat.add_generation_prompt,
    }


def rules_of(chat: ChatPrompt, content_format: ContentFormat | None = None) -> dict[str, Any]:
    """How ``render_process.rendered`` is to render a chat."""
    return {
        "continue_final_message": chat.continue_final_message,
        "content_format": content_format,
    }


class ChatRenderers:
    """Owns the processes that render.

    The operator chose the model's template, so a render of it that takes too long is the fault
    of one chat and not held against the template. No adapter's template meets its process.

    Args:
        base: the model's template; None: it has none.
        content_format: the form of contents that it reads; None: the one that shows in it.
    """

    def __init__(
        self,
        base: ChatTemplate | None,
        limits: RenderLimits | None = None,
        content_format: ContentFormat | None = None,
    ) -> None:
        limits = limits or RenderLimits()
        self._base = base
        self._content_format = content_format
        self._for_base = RendererPool(
            replace(limits, gives_way_after_s=None), _NUM_BASE, num_per_template=_NUM_BASE
        )
        self._for_adapters = RendererPool(limits, _NUM_ADAPTERS, overruns=Overruns())
        self._warming: asyncio.Task[None] | None = None

    async def render(self, chat: ChatPrompt, own: ChatTemplate | None = None) -> str:
        """Return the text of a chat; raises TemplateError.

        ``own`` is the template of the request's adapter.
        """
        values, with_tools = values_of(chat), chat.tools is not None
        if own is not None and (self._base is None or own.key != self._base.key):
            chosen = own.chosen(with_tools=with_tools)
            return await self._for_adapters.render(chosen, values, rules_of(chat))
        if self._base is None:
            raise TemplateError("this model has no chat template; send the prompt as it is")
        chosen = self._base.chosen(with_tools=with_tools)
        return await self._for_base.render(chosen, values, rules_of(chat, self._content_format))

    def start(self) -> None:
        """Start the process for the model's template in the background."""
        if self._base is not None:
            self._warming = asyncio.create_task(self._for_base.warm_up())

    async def close(self) -> None:
        """End all processes."""
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
        await self._for_base.close()
        await self._for_adapters.close()
