"""What the bodies have in common whose ``model`` names the base or an adapter."""

from __future__ import annotations

from typing import Any, ClassVar

from lorax_contract.errors import ValidationError
from lorax_router.http_api.json_body import StrictBody

# Values with which a field changes nothing.
_IDLE: tuple[Any, ...] = (None, False, [], {}, "")


class ModelBody(StrictBody):
    """Which model is asked; all dialects but LoRAX's share it."""

    # Fields that are not honoured, and the values with which they change nothing.
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
        """Raise ValidationError for a field that would change the answer, and cannot."""
        for name, harmless in self.refused.items():
            value = (self.model_extra or {}).get(name)
            if not any(value is each or value == each for each in (*_IDLE, *harmless)):
                raise ValidationError(f"`{name}` is not offered by this server; leave it out")
