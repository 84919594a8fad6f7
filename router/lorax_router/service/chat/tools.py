"""The tools of a chat, and which of them must be called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# What a tool takes whose definition names no parameters.
_NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTool:
    """A function that the model may call."""

    name: str
    # A JSON schema of its arguments.
    parameters: Mapping[str, Any] = field(default_factory=lambda: _NO_PARAMETERS, repr=False)
    # Whether its arguments must be of the schema whenever it is called.
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Whether tools are called: as the model likes, not at all, at least one, or the one named."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None
    # Whether at most one is called.
    is_single: bool = False

    @property
    def is_forced(self) -> bool:
        """Whether the answer is calls and nothing else."""
        return self.mode in ("required", "named")


def tools_of(definitions: Iterable[Mapping[str, Any]]) -> list[FunctionTool]:
    """Return the functions of checked definitions in the form that chat templates take."""
    functions = [each["function"] for each in definitions if each.get("type") == "function"]
    return [
        FunctionTool(
            name=each["name"],
            parameters=each.get("parameters") or _NO_PARAMETERS,
            strict=bool(each.get("strict")),
        )
        for each in functions
    ]
