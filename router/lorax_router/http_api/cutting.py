"""vLLM's way to ask that texts are cut."""

from __future__ import annotations

from lorax_contract.errors import ValidationError


def cut_to(given: int | None) -> int | None:
    """Return the service's value of vLLM's ``truncate_prompt_tokens``; raises ValidationError."""
    if given is not None and given != -1 and given < 1:
        raise ValidationError(f"`truncate_prompt_tokens` must be -1 or at least 1, got {given}")
    return 0 if given == -1 else given
