"""Renders templates in the test's own process: for tests of everything but the processes."""

from __future__ import annotations

from lorax_contract.errors import TemplateError
from lorax_router.service.prompts import sandbox
from lorax_router.service.prompts.chat_renderers import values_of
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.service.requests import ChatPrompt


class InlineTemplates:
    """Implements validation's TemplateRenderer; ``text`` is the model's template, if any."""

    def __init__(self, text: str | None) -> None:
        self._base = None if text is None else ChatTemplate(text)

    async def render(self, chat: ChatPrompt, own: ChatTemplate | None = None) -> str:
        template = own or self._base
        if template is None:
            raise TemplateError("this model has no chat template; send the prompt as it is")
        values = {**template.special_tokens, **values_of(chat)}
        return sandbox.render(sandbox.compile_template(template.text), values, 1 << 20)
