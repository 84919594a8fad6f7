"""Values of options that are taken in more ways than one."""

from __future__ import annotations

from typing import Any, get_args

import click

from lorax_contract.config import Task
from lorax_launcher.environment import LOG_LEVELS, log_level

# vLLM's, and the hub's names for models that are made for each.
_OTHER_TASK_NAMES = {
    "embedding": "embed",
    "score": "rerank",
    "text-generation": "generate",
    "feature-extraction": "embed",
    "sentence-similarity": "embed",
    "text-classification": "classify",
    "token-classification": "token-classify",
    "text-ranking": "rerank",
}


class Switch(click.ParamType):  # type: ignore[type-arg]
    """On when it is given; a value is taken too, and an empty one, as charts write it, is on."""

    name = "switch"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        """Return whether it is on; fails for what is neither true nor false."""
        return True if value == "" else bool(click.BOOL.convert(value, param, ctx))


class TaskName(click.Choice):  # type: ignore[type-arg]
    """What a model is served for, in the words of vLLM and of the hub too."""

    def __init__(self) -> None:
        super().__init__(get_args(Task))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the task's own name; fails for what is none."""
        named = str(value).lower()
        found: str = super().convert(_OTHER_TASK_NAMES.get(named, named), param, ctx)
        return found


class LogLevel(click.Choice):  # type: ignore[type-arg]
    """A level of the log, in the words of other programs too."""

    def __init__(self) -> None:
        super().__init__(LOG_LEVELS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the level's own name; fails for what is none."""
        return log_level(str(value)) or super().convert(value, param, ctx)
