"""The process that renders chat templates: ``python -m`` it with its bounds as JSON."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jinja2 import Template

from lorax_router.service.processes.serving import nurse
from lorax_router.service.prompts import sandbox
from lorax_router.service.prompts.content_format import content_format_of
from lorax_router.service.prompts.message_values import (
    cut_at_end,
    mark_end,
    messages_for_template,
)

# Compiled templates that are kept; a large one takes a few hundred KB.
_NUM_COMPILED = 16


@functools.lru_cache(maxsize=_NUM_COMPILED)
def _compiled(text: str) -> Template:
    return sandbox.compile_template(text)


def rendered(text: str, values: Mapping[str, Any], rules: Mapping[str, Any], max_chars: int) -> str:
    """Return what a template makes of a chat; raises what ``sandbox`` raises.

    ``rules``: ``content_format``, the form of contents where the template itself is not to
    say it; ``continue_final_message``, whether the text ends within the last message.
    """
    template = _compiled(text)
    form = rules.get("content_format") or content_format_of(text)
    messages = messages_for_template(values.get("messages") or (), form)
    if not rules.get("continue_final_message"):
        return sandbox.render(template, {**values, "messages": messages}, max_chars)
    last = mark_end(messages, text)
    written = sandbox.render(template, {**values, "messages": messages}, max_chars)
    return cut_at_end(written, last)


def answer(question: dict[str, Any], _blobs: list[bytes]) -> dict[str, Any]:
    """Return the text, or what went wrong: ``invalid``, ``failed``, ``long`` or ``memory``."""
    try:
        return {"text": rendered(**question)}
    except sandbox.InvalidTemplateError as error:
        return {"invalid": str(error)}
    except sandbox.TextTooLongError as error:
        return {"long": str(error)}
    except sandbox.RenderError as error:
        return {"failed": str(error)}
    except MemoryError:
        return {"memory": ""}
    except Exception as error:  # noqa: BLE001 - a message that nobody thought of, too, costs no process
        return {"failed": type(error).__name__}


if __name__ == "__main__":
    nurse(answer)
