"""Constraints for tests, in few words."""

from __future__ import annotations

import json
from typing import Any

from lorax_contract.constraint import Constraint, ConstraintKind


def schema(document: Any) -> Constraint:
    """Return what binds an output to a JSON schema."""
    return Constraint(kind=ConstraintKind.JSON_SCHEMA, text=json.dumps(document))


def regex(pattern: str) -> Constraint:
    return Constraint(kind=ConstraintKind.REGEX, text=pattern)


def lark(grammar: str) -> Constraint:
    return Constraint(kind=ConstraintKind.LARK, text=grammar)


def choice(*texts: str) -> Constraint:
    return Constraint(kind=ConstraintKind.CHOICE, text=json.dumps(texts))


class AnyConstraints:
    """Takes every constraint as it is."""

    async def ready(self, constraint: Constraint, _content: object) -> Constraint:
        """Return it."""
        return constraint
