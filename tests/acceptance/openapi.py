"""The served OpenAPI document, held against the server by schemathesis."""

from __future__ import annotations

import asyncio
import re
import tempfile

from tests.acceptance.environments import environment, fake_server, run_program
from tests.acceptance.harness import Point, Result

SCHEMATHESIS = "schemathesis==4.32.5"
# What the document promises: no 5xx, no status, content type or shape beside those it names.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "unsupported_method",
)  # fmt: skip
EXAMPLES = 50
BOUND_S = 1200.0


async def run_schemathesis(url: str, programs: str, examples: int = EXAMPLES) -> Result:
    """Ask every operation of a server's document so many times, always the same things."""
    command = [
        f"{programs}/schemathesis", "run", f"{url}/api-doc/openapi.json", "--no-color",
        "--checks", ",".join(CHECKS), "--max-examples", str(examples),
        "--phases", "examples,coverage,fuzzing", "--generation-deterministic",
        "--request-timeout", "60", "--continue-on-failure", "--warnings", "off",
        "--suppress-health-check", "filter_too_much,too_slow",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        # What it remembers of a run lies where it runs.
        code, output = await run_program(*command, timeout_s=BOUND_S, cwd=folder)
    if code:
        print(output[-20000:])
    figures = re.findall(r"Tested: \d+|\d+ generated, .*", output)
    return Result(code == 0, "; ".join(figures) or f"exit {code}: {output[-200:]}")


def point_schemathesis() -> Result:
    """No 5xx and nothing undocumented: clients' routes, then those of the operator."""

    async def measure(programs: str) -> list[Result]:
        async with fake_server(max_total_tokens=256, max_concurrent_requests=64) as server:
            return [await run_schemathesis(url, programs) for url in (server.url, server.admin_url)]

    with environment(SCHEMATHESIS) as programs:
        clients, operator = asyncio.run(measure(str(programs)))
    return Result(
        clients.ok and operator.ok, f"clients: {clients.figure}; operator: {operator.figure}"
    )


POINTS = [Point("4", "schemathesis finds no 5xx and nothing undocumented", point_schemathesis)]
