"""The points of the list: other people's clients against this server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.acceptance import (
    generated_client,
    grpc_hostile,
    log_scan,
    openapi,
    published_clients,
    tenants,
)
from tests.acceptance.clients import bound_speed, lm_eval_harness, structured_output
from tests.acceptance.clients.calls import point_calls
from tests.acceptance.clients.runs import PROGRAMS, run_client
from tests.acceptance.clients.texts import point_texts
from tests.acceptance.harness import Point, Result
from tests.acceptance.look.documented import point_readme
from tests.acceptance.suites import ROOT, run_suite
from tests.helpers.server import Server

ADAPTERS = ROOT / "examples/adapters"
OPTIONS = (
    "--served-model-name", "base", "--adapter-local-root", str(ADAPTERS),
    "--lora-modules", f"pirate={ADAPTERS / 'pirate'}",
)  # fmt: skip


def _client(name: str) -> Callable[[], Result]:
    def measure() -> Result:
        with Server(*OPTIONS, *PROGRAMS[name].options) as server:
            return asyncio.run(run_client(name, server.url, "base", "pirate"))

    return measure


def point_templates() -> Result:
    """Chats by five templates as transformers renders them; parsers, however a text is cut."""
    run = run_suite(
        "tests/unit/service/prompts/test_chat_formats.py",
        "tests/unit/service/chat",
        env={"LORAX_EXAMPLES": "4"},
    )
    return Result(run.is_clean, f"{run.counts['passed']} tests passed; {'; '.join(run.figures)}")


POINTS = [
    *(Point(f"1 {name}", f"{name}, unmodified", _client(name)) for name in PROGRAMS),
    *published_clients.POINTS,
    *lm_eval_harness.POINTS,
    *structured_output.POINTS,
    *bound_speed.POINTS,
    Point("5", "chats are rendered and read as their templates have it", point_templates),
    Point("6c", "streamed calls of tools are those of the whole answer", point_calls),
    Point("6t", "streamed texts are those of the whole answer", point_texts),
    *generated_client.POINTS,
    *openapi.POINTS,
    Point("8", "what the README shows works as pasted", point_readme),
    *tenants.POINTS,
    *grpc_hostile.POINTS,
    *log_scan.POINTS,
]
