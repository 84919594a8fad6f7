"""What the bodies have in common whose ``model`` names the base or an adapter."""

from __future__ import annotations

from typing import Any, ClassVar

from lorax_router.http_api.field_names import BodyError
from lorax_router.http_api.json_body import StrictBody

# Values with which a field changes nothing.
_IDLE: tuple[Any, ...] = (None, False, [], {}, "")
# Fields of other dialects and servers that change the answer where they are known, with further
# such values. A body that does not know one of them says so.
_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            # What is asked.
            "chat_template", "chat_template_kwargs", "documents", "function_call", "functions",
            "input", "inputs", "instructions", "messages", "prompt", "prompt_embeds", "suffix",
            "system", "tools",
            # How tokens are drawn.
            "allowed_token_ids", "bad_words", "logit_bias", "logits_processors", "seed",
            "use_beam_search", "watermark",
            # Where the answer ends.
            "continue_final_message", "ignore_eos", "ignore_eos_token", "max_completion_tokens",
            "max_new_tokens", "max_output_tokens", "max_tokens", "stop", "stop_sequences",
            "stop_token_ids", "truncate",
            # What it is bound to.
            "grammar", "guided_choice", "guided_grammar", "guided_json", "guided_regex",
            "output_config", "output_format", "structured_outputs",
            # What it tells.
            "audio", "echo", "logprobs", "prompt_logprobs", "return_full_text",
            "return_token_ids", "return_tokens_as_token_ids", "top_logprobs",
            # Whose it is.
            "adapter_parameters", "merged_adapters",
        ),
        (),
    ),
    "add_special_tokens": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "thinking": ({"type": "disabled"},),
    "top_k": (-1,),
    "truncate_prompt_tokens": (-1,),
    "typical_p": (1,),
}  # fmt: skip
# The same, where false is what changes it.
_TRUE_ELSEWHERE = ("include_reasoning", "skip_special_tokens", "spaces_between_special_tokens")


class ModelBody(StrictBody):
    """Which model is asked; all dialects but LoRAX's share it."""

    # Fields that are not honoured beside those, and the values with which they change nothing.
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str | None = None
    """The base model, or an adapter: its alias, or `source:id`, or an id of the default source."""
    adapter_source: str | None = None
    """Where the adapter that `model` names lies: hub, local or s3."""
    adapter_id: str | None = None
    """The adapter, as LoRAX names it; `model` must be the base's then."""
    api_token: str | None = None
    """Token for private adapters; without API keys the Bearer token of the request if absent."""

    def check_refused(self) -> None:
        """Raise BodyError for a field that would change the answer, and cannot."""
        refused = {**_ELSEWHERE, **self.refused}
        for name, value in (self.model_extra or {}).items():
            idle = (*_IDLE, *refused.get(name, ()))
            changes = name in refused and not any(value is each or value == each for each in idle)
            if changes or (name in _TRUE_ELSEWHERE and value is False):
                raise BodyError(f"`{name}` is not offered here; leave it out")
