"""The process that renders chat templates: ``python -m`` it with its bounds as JSON."""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

from jinja2 import Template

from lorax_router.service.processes.serving import Bounds, serve
from lorax_router.service.prompts import sandbox

# Compiled templates that are kept; a large one takes a few hundred KB.
_NUM_COMPILED = 16


@functools.lru_cache(maxsize=_NUM_COMPILED)
def _compiled(text: str) -> Template:
    return sandbox.compile_template(text)


def answer(question: dict[str, Any], _blobs: list[bytes]) -> dict[str, Any]:
    """Return the text, or what went wrong: ``invalid``, ``failed``, ``long`` or ``memory``."""
    try:
        template = _compiled(question["template"])
        return {"text": sandbox.render(template, question["values"], question["max_chars"])}
    except sandbox.InvalidTemplateError as error:
        return {"invalid": str(error)}
    except sandbox.TextTooLongError as error:
        return {"long": str(error)}
    except sandbox.RenderError as error:
        return {"failed": str(error)}
    except MemoryError:
        return {"memory": ""}


if __name__ == "__main__":
    serve(answer, Bounds(**json.loads(sys.argv[1])))
