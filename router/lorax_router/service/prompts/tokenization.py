"""Tokens of texts and chats, and texts of tokens, for clients who ask for just that."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tokenizers import Tokenizer

from lorax_contract.errors import ValidationError
from lorax_router.service.adapters.text import AdapterText
from lorax_router.service.limits import RequestLimits
from lorax_router.service.prompts.prompt_encoder import PromptEncoder, TemplateRenderer
from lorax_router.service.prompts.tokenizer_pool import TokenizerPool, TokenSpan
from lorax_router.service.requests import Prompt

_BASE_TEXT = AdapterText()


class Tokenization:
    """The base model's tokenizer and chat template, within the limits of requests."""

    def __init__(
        self, limits: RequestLimits, tokenizer: TokenizerPool, templates: TemplateRenderer
    ) -> None:
        self.limits = limits
        self.pool = tokenizer
        self._prompts = PromptEncoder(limits, tokenizer, templates)

    async def spans(self, text: str, *, add_special_tokens: bool) -> list[TokenSpan]:
        """Return the tokens of a text with their places in it; raises ValidationError."""
        limit = self.limits.max_input_chars
        if len(text) > limit:
            raise ValidationError(
                f"`inputs` must have at most {limit} characters, got {len(text)}; tokenize it in "
                "parts"
            )
        return await self.pool.tokenize(text, add_special_tokens=add_special_tokens)

    async def ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt; raises ValidationError, TemplateError."""
        self._prompts.check(prompt)
        return list((await self._prompts.encode(prompt, _BASE_TEXT)).ids)

    async def strings(self, ids: Sequence[int]) -> list[str]:
        """Return what the vocabulary has for ids that are known to be in it."""
        return await self.pool.run(_strings, self.pool.tokenizer, ids)

    @functools.cached_property
    def special_tokens(self) -> dict[int, str]:
        """The tokens that stand for no text, by their ids."""
        added = self.pool.tokenizer.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items() if token.special}

    async def text(
        self, ids: Sequence[int], *, name: str = "tokens", skip_special_tokens: bool = False
    ) -> str:
        """Return the text of token ids; raises ValidationError, which calls them by ``name``."""
        limit = self.limits.max_input_chars
        if len(ids) > limit:
            raise ValidationError(
                f"`{name}` must have at most {limit} ids, got {len(ids)}; send them in parts"
            )
        return await self.pool.run(
            _text, self.pool.tokenizer, name, ids, self.limits.vocab_size, skip_special_tokens
        )


def _strings(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.id_to_token(each) or "" for each in ids]


def _text(
    tokenizer: Tokenizer, name: str, ids: Sequence[int], vocab_size: int, skip_special_tokens: bool
) -> str:
    for wrong in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= wrong < vocab_size:
            raise ValidationError(
                f"`{name}`: {wrong} is not a token of this model, whose ids go from 0 to "
                f"{vocab_size - 1}"
            )
    # The batch call lets other threads run meanwhile.
    return tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
