"""What binds an output in LoRAX's fields and in TGI's, which come the same way."""

from __future__ import annotations

from typing import Any

from lorax_contract.constraint import Constraint
from lorax_contract.errors import ValidationError
from lorax_router.service.constraints.formats import of_grammar, of_json, of_response_format


def constraint_of(
    *, response_format: Any = None, schema: Any = None, grammar: Any = None
) -> Constraint | None:
    """Return what these fields ask for together; None: nothing. Raises ValidationError.

    ``schema`` is what LoRAX's document has, a JSON schema as text; ``grammar`` is TGI's.
    """
    asked = {
        "response_format": of_response_format(response_format),
        "schema": None if schema is None else of_json(schema, "schema"),
        "grammar": None if grammar is None else of_grammar(grammar),
    }
    binding = {name: constraint for name, constraint in asked.items() if constraint is not None}
    if len(binding) > 1:
        one, two = [*binding][:2]
        raise ValidationError(f"`{one}` and `{two}` bind the output twice; give one of them")
    return next(iter(binding.values()), None)
