"""Renders templates in the test's own process: for tests of everything but the processes."""

from __future__ import annotations

from lorax_contract.errors import TemplateError
from lorax_router.service.prompts import sandbox
from lorax_router.service.prompts.chat_renderers import rules_of, values_of
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.service.prompts.render_process import rendered
from lorax_router.service.requests import ChatPrompt


class InlineTemplates:
    """Implements validation's TemplateRenderer; ``base`` is the model's template, if any."""

    def __init__(self, base: str | ChatTemplate | None) -> None:
        self._base = ChatTemplate(base) if isinstance(base, str) else base

    async def render(self, chat: ChatPrompt, own: ChatTemplate | None = None) -> str:
        template = own or self._base
        if template is None:
            raise TemplateError("this model has no chat template; send the prompt as it is")
        chosen = template.chosen(with_tools=chat.tools is not None)
        values = {**chosen.special_tokens, **values_of(chat)}
        try:
            return rendered(chosen.text, values, rules_of(chat), 1 << 20)
        except sandbox.RenderError as error:
            raise TemplateError(f"the chat template of {chosen.owner} failed: {error}") from error
