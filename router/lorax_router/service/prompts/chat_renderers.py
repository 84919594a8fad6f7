"""Renders chats by the model's template or by an adapter's, each apart from the other."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from lorax_contract.errors import TemplateError
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.service.prompts.overruns import Overruns
from lorax_router.service.prompts.renderer_pool import RendererPool, RenderLimits
from lorax_router.service.requests import ChatPrompt

# Processes at most; they start when there is something to do.
_NUM_BASE = 2
_NUM_ADAPTERS = 2


def values_of(chat: ChatPrompt) -> dict[str, Any]:
    """What a template is given of a chat."""
    return {
        **chat.template_kwargs,
        "messages": list(chat.messages),
        "tools": chat.tools,
        "documents": chat.documents,
        "add_generation_prompt": chat.add_generation_prompt,
    }


class ChatRenderers:
    """Owns the processes that render.

    The operator chose the model's template, so a render of it that takes too long is the fault
    of one chat and not held against the template. No adapter's template meets its process.

    Args:
        base: the model's template; None: it has none.
    """

    def __init__(self, base: ChatTemplate | None, limits: RenderLimits | None = None) -> None:
        limits = limits or RenderLimits()
        self._base = base
        self._for_base = RendererPool(
            replace(limits, gives_way_after_s=None), _NUM_BASE, num_per_template=_NUM_BASE
        )
        self._for_adapters = RendererPool(limits, _NUM_ADAPTERS, overruns=Overruns())
        self._warming: asyncio.Task[None] | None = None

    async def render(self, chat: ChatPrompt, own: ChatTemplate | None = None) -> str:
        """Return the text of a chat; raises TemplateError.

        ``own`` is the template of the request's adapter.
        """
        values = values_of(chat)
        if own is not None and (self._base is None or own.key != self._base.key):
            return await self._for_adapters.render(own, values)
        if self._base is None:
            raise TemplateError("this model has no chat template; send the prompt as it is")
        return await self._for_base.render(self._base, values)

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
