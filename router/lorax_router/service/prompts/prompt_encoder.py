"""Makes token ids of prompts, whatever they are given as: the one place for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lorax_contract.errors import ValidationError
from lorax_router.service.adapters.text import AdapterText
from lorax_router.service.limits import RequestLimits
from lorax_router.service.prompts.chat_renderers import check_chat
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.service.prompts.encoding import Span, TextToEncode
from lorax_router.service.prompts.shared_texts import SharedTexts
from lorax_router.service.prompts.tokenizer_pool import TokenizerPool
from lorax_router.service.requests import ChatPrompt, Prompt, TextPrompt, TokenPrompt


class EncodedPrompt(NamedTuple):
    """A prompt's ids, and what else is known of how they came about."""

    ids: Sequence[int]
    # What a chat template made of a chat; "" of other prompts.
    text: str = ""
    # As EncodedText has them.
    second_start: int = 0
    spans: Sequence[Span] | None = None


class TemplateRenderer(Protocol):
    """Makes a text of a chat."""

    async def render(self, chat: ChatPrompt, own: ChatTemplate | None = None) -> str:
        """Render by an adapter's own template or by the model's; raises TemplateError."""
        ...


class PromptEncoder:
    """Checks prompts before anything is computed, then makes ids of them.

    Args:
        tokenizer: the base model's.
    """

    def __init__(
        self, limits: RequestLimits, tokenizer: TokenizerPool, templates: TemplateRenderer
    ) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._templates = templates
        self._shared = SharedTexts(tokenizer)

    def check(self, prompt: Prompt, *, is_cut: bool = False) -> None:
        """Raise ValidationError for a prompt that is empty or can never be short enough."""
        match prompt:
            case TextPrompt(text, second=second):
                if not text or second == "":
                    raise ValidationError("`inputs` must not be empty")
                if not is_cut:
                    self._check_chars(len(text) + len(second or ""))
            case TokenPrompt(ids):
                self._check_ids(ids)
            case ChatPrompt():
                if not prompt.messages:
                    raise ValidationError("`messages` must not be empty")
                check_chat(prompt)
                self._check_chars(sum(map(_num_chars, prompt.messages)))

    async def encode(
        self,
        prompt: Prompt,
        own: AdapterText,
        truncate: int | None = None,
        cut_to: int | None = None,
        *,
        with_spans: bool = False,
    ) -> EncodedPrompt:
        """Return the ids of a prompt; raises ValidationError, TemplateError.

        ``own`` is what the request's adapter brings for texts; ``truncate`` and ``cut_to`` are as
        GenerateParameters has them.
        """
        if cut_to is not None:
            cut_to = cut_to or self._limits.max_input_length
        encoded = await self._encoded(prompt, own, cut_to, with_spans)
        if not encoded.ids:
            raise ValidationError("`inputs` has no tokens for this model's tokenizer")
        # Cut before any length is checked, and here only: what is counted is what runs.
        return encoded if truncate is None else encoded._replace(ids=encoded.ids[-truncate:])

    async def _encoded(
        self, prompt: Prompt, own: AdapterText, cut_to: int | None, with_spans: bool
    ) -> EncodedPrompt:
        if isinstance(prompt, TokenPrompt):
            return EncodedPrompt(prompt.ids[:cut_to])
        tokenizer = own.tokenizer or self._tokenizer
        if isinstance(prompt, TextPrompt):
            asked = self._text_to_encode(prompt, cut_to, with_spans)
            if prompt.shared and own.tokenizer is None:
                encoded = await self._shared.encode(prompt.shared, asked)
            else:
                encoded = await tokenizer.encode(asked)
            ids, second_start, spans = encoded
            return EncodedPrompt(ids, "", second_start, spans)
        text = await self._templates.render(prompt, own.chat_template)
        self._check_chars(len(text))
        # A template writes the special tokens itself.
        encoded = await tokenizer.encode(TextToEncode(text, add_special_tokens=False))
        return EncodedPrompt(encoded.ids, text)

    def _text_to_encode(
        self, prompt: TextPrompt, cut_to: int | None, with_spans: bool
    ) -> TextToEncode:
        text, second = prompt.text, prompt.second
        if cut_to is not None:
            # What is behind so many characters is cut whatever the tokens are.
            most = self._limits.max_input_chars
            text, second = text[:most], second and second[:most]
        return TextToEncode(
            text,
            second,
            add_special_tokens=prompt.add_special_tokens,
            cut_to=cut_to,
            with_spans=with_spans,
        )

    def _check_chars(self, num_chars: int) -> None:
        limit = self._limits.max_input_chars
        if num_chars > limit:
            raise ValidationError(
                f"`inputs` must have at most {limit} characters, got {num_chars}; shorten it"
            )

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ValidationError("`inputs` must not be empty")
        limit = self._limits.max_input_length
        # What is longer by far is not looked at; what is cut off may make it short enough.
        if len(ids) > self._limits.max_input_chars:
            raise ValidationError(
                f"`inputs` must have at most {limit} tokens, got {len(ids)}; shorten it"
            )
        least, largest = min(ids), max(ids)
        if least < 0 or largest >= self._limits.vocab_size:
            wrong = least if least < 0 else largest
            raise ValidationError(
                f"`inputs`: {wrong} is not a token of this model, whose ids go from 0 to "
                f"{self._limits.vocab_size - 1}"
            )


def _num_chars(message: Mapping[str, Any]) -> int:
    """Characters of what a message says, in one text or in parts."""
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return sum(len(text) for text in texts if isinstance(text, str))
