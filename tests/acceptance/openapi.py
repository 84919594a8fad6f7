"""The served OpenAPI document, held against the server by schemathesis."""

from __future__ import annotations

import asyncio
import re

from tests.acceptance.environments import environment, fake_server, run_program
from tests.acceptance.harness import Point, Result

SCHEMATHESIS = "schemathesis==4.32.5"
# What the document promises: no 5xx, no status, content type or shape beside those it names.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "unsupported_method",
)  # fmt: skip
EXAMPLES = 60
BOUND_S = 900.0


async def run_schemathesis(url: str, programs: str, *, document: str, examples: int) -> Result:
    """Ask every operation of the document so many times, always the same things."""
    command = [
        f"{programs}/schemathesis", "run", f"{url}{document}", "--no-color",
        "--checks", ",".join(CHECKS), "--max-examples", str(examples),
        "--phases", "examples,coverage,fuzzing", "--generation-deterministic", "--seed", "9",
        "--generation-database", "none", "--request-timeout", "60", "--continue-on-failure",
        "--warnings", "off",
    ]  # fmt: skip
    code, output = await run_program(*command, timeout_s=BOUND_S)
    if code:
        print(output[-20000:])
    summary = re.findall(r"^ *(?:Test cases|Operations|Failures).*$", output, re.MULTILINE)
    tail = [line.strip() for line in output.splitlines() if line.strip()][-1:]
    return Result(code == 0, "; ".join(map(str.strip, summary)) or "; ".join(tail))


def point_schemathesis() -> Result:
    """No 5xx and nothing undocumented in a bounded run against a server of fakes."""

    async def measure(programs: str) -> Result:
        async with fake_server(max_total_tokens=256, max_concurrent_requests=64) as url:
            return await run_schemathesis(
                url, programs, document="/api-doc/openapi.json", examples=EXAMPLES
            )

    with environment(SCHEMATHESIS) as programs:
        return asyncio.run(measure(str(programs)))


POINTS = [Point("4", "schemathesis finds no 5xx and nothing undocumented", point_schemathesis)]
