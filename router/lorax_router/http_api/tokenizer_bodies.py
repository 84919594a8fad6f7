"""Bodies of ``/tokenize`` and ``/detokenize``: LoRAX's, and vLLM's where they differ."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from lorax_contract.errors import ValidationError
from lorax_router.http_api.json_body import Integer, Items, StrictBody
from lorax_router.service.requests import ChatPrompt, Prompt, TextPrompt

# Texts of one call.
MAX_AT_ONCE = 64
_GIVEN = ("inputs", "prompt", "messages")


class TokenizeBody(StrictBody):
    """What to tokenize: one of `inputs` (LoRAX's), `prompt` and `messages` (vLLM's)."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
                for name in _GIVEN
            ]
        }
    )

    inputs: str | Items[str] | None = None
    """A text; the answer is an array of its tokens with their places in it. Of a list of texts it is
    TEI's: such an array for each, which says of tokens whether they are special."""
    prompt: str | None = None
    """A text; the answer is an object with the ids of its tokens."""
    messages: Items[dict[str, Any]] | None = None
    """A chat, rendered by the model's template; the answer is an object with the ids."""
    prompt_name: str | None = None
    """TEI's, and refused: put what texts begin with in front of them."""
    model: str | None = None
    """Taken, and not looked at: the tokens are the base model's."""
    add_special_tokens: bool | None = None
    """Add the tokens that the model expects around a prompt; true if absent. A chat template
    writes them itself."""
    return_token_strs: bool = False
    """With `prompt` or `messages`: what the vocabulary has for each id, too."""
    add_generation_prompt: bool = True
    """With `messages`: end where the assistant begins to speak."""
    continue_final_message: bool = False
    """With `messages`: end within the last one."""
    tools: Items[dict[str, Any]] | None = None
    """With `messages`: tools that the template may tell of."""
    chat_template_kwargs: dict[str, Any] | None = None
    """With `messages`: what the template is given beside that."""

    def check(self) -> None:
        """Raise ValidationError unless just one thing is to be tokenized."""
        given = [name for name in _GIVEN if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValidationError(
                "one of `inputs`, `prompt` and `messages` must be given"
                + (f", got {' and '.join(f'`{name}`' for name in given)}" if given else "")
            )
        if self.prompt_name is not None:
            raise ValidationError(
                "`prompt_name` is not offered where texts are tokenized; put what they begin with in "
                "front of them"
            )
        if isinstance(self.inputs, list) and not 0 < len(self.inputs) <= MAX_AT_ONCE:
            raise ValidationError(
                f"`inputs` takes from 1 to {MAX_AT_ONCE} texts, got {len(self.inputs)}"
            )

    def to_prompt(self) -> Prompt:
        """Return the service's value of a ``prompt`` or of ``messages``."""
        if self.messages is None:
            return TextPrompt(self.prompt or "", self.add_special_tokens is not False)
        return ChatPrompt(
            messages=self.messages,
            tools=self.tools,
            template_kwargs=self.chat_template_kwargs or {},
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )


class DetokenizeBody(StrictBody):
    """Token ids to make a text of."""

    tokens: Items[Integer]
    """Ids of the base model's vocabulary."""
    model: str | None = None
    """Taken, and not looked at."""


class DecodeBody(StrictBody):
    """TEI's: token ids to make texts of."""

    ids: Items[Integer] | Items[Items[Integer]]
    """Ids of the base model's vocabulary, or a list of them for each text."""
    skip_special_tokens: bool = True
    """Leave out the tokens that stand for no text."""

    @property
    def rows(self) -> list[list[int]]:
        """The ids of each text; raises ValidationError."""
        rows: list[Any] = list(self.ids)
        if not any(isinstance(each, list) for each in rows):
            return [rows]
        if len(rows) > MAX_AT_ONCE:
            raise ValidationError(f"`ids` takes at most {MAX_AT_ONCE} texts, got {len(rows)}")
        return rows


class TokenIdsAnswer(BaseModel):
    """The ids of a prompt's tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(BaseModel):
    """The text of token ids."""

    prompt: str
