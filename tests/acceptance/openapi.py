"""The served OpenAPI document, held against the server by schemathesis.

Every route of the clients' listener and of the operator's: without keys, and with keys for those
who may do all, for a tenant, for the scraper and for nobody.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from tests.acceptance.environments import environment, fake_server, run_program
from tests.acceptance.harness import Point, Result
from tests.helpers.http_app import TEMPLATE
from tests.helpers.tenants import ADMIN_KEY, METRICS_KEY, bearer, key_of, keys_file

from lorax_contract.keys import hash_of
from lorax_router.http_api.auth import PROBES

SCHEMATHESIS = "schemathesis==4.32.5"
# What the document promises: no 5xx, no status, content type or shape beside those it names, and
# a key where it says so.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "unsupported_method",
)  # fmt: skip
EXAMPLES = 50
# Of callers whose calls nearly all end before a route is reached, a method that is none among them.
REFUSED_EXAMPLES = 5
REFUSED_CHECKS = tuple(each for each in CHECKS if each != "unsupported_method")
BOUND_S = 1200.0
LIMITS = {"max_total_tokens": 256, "max_concurrent_requests": 64}


@dataclass(frozen=True, slots=True)
class Run:
    """One run over all operations of a document."""

    title: str
    url: str
    # None: without one.
    key: str | None = None
    examples: int = EXAMPLES
    checks: Sequence[str] = CHECKS
    phases: str = "examples,coverage,fuzzing"
    # Statuses that no answer may have, but those of probes.
    never: frozenset[int] = frozenset()


async def run_schemathesis(run: Run, document: Path, programs: str) -> Result:
    """Ask every operation of a document so many times, always the same things."""
    command = [
        f"{programs}/schemathesis", "run", str(document), "--url", run.url, "--no-color",
        "--checks", ",".join(run.checks), "--max-examples", str(run.examples),
        "--phases", run.phases, "--generation-deterministic",
        "--request-timeout", "60", "--continue-on-failure", "--warnings", "off",
        "--suppress-health-check", "filter_too_much,too_slow",
    ]  # fmt: skip
    if run.key is not None:
        command += ["--header", f"Authorization: Bearer {run.key}"]
    with tempfile.TemporaryDirectory() as folder:
        # What it remembers of a run lies where it runs.
        report = Path(folder) / "calls.har"
        if run.never:
            command += ["--report", "har", "--report-har-path", str(report)]
        code, output = await run_program(*command, timeout_s=BOUND_S, cwd=folder)
        wrong = _forbidden(report, run.never)
    if code:
        print(output[-20000:])
    if wrong:
        print("\n".join(wrong[:20]))
    figures = re.findall(r"Tested: \d+|\d+ generated, .*", output)
    figure = "; ".join(figures) or f"exit {code}: {output[-200:]}"
    return Result(code == 0 and not wrong, f"{run.title}: {figure}")


def _forbidden(report: Path, never: frozenset[int]) -> list[str]:
    """Return calls that were answered as none of the run may be."""
    if not never:
        return []
    entries = json.loads(report.read_text())["log"]["entries"]
    return [
        f"{entry['response']['status']}: {entry['request']['method']} {entry['request']['url']}"
        for entry in entries
        if entry["response"]["status"] in never
        and httpx.URL(entry["request"]["url"]).path not in PROBES
    ]


async def _document(url: str, key: str | None, folder: str) -> Path:
    """Write what a server says of itself to a file."""
    async with httpx.AsyncClient(headers=bearer(key) if key else {}) as client:
        answer = await client.get(f"{url}/api-doc/openapi.json")
    path = Path(folder) / f"{httpx.URL(url).port}.json"
    path.write_bytes(answer.raise_for_status().content)
    return path


async def _all(programs: str, runs: Sequence[Run], document_key: str | None = None) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for run in runs:
            document = await _document(run.url, document_key, folder)
            results.append(await run_schemathesis(run, document, programs))
            print(f"    {results[-1].figure}", flush=True)
    return Result(all(each.ok for each in results), "; ".join(each.figure for each in results))


async def without_keys(programs: str) -> Result:
    """Run over clients' routes, then over those of the operator."""
    async with fake_server(template=TEMPLATE, **LIMITS) as server:
        runs = [Run("clients", server.url), Run("operator", server.admin_url)]
        return await _all(programs, runs)


async def with_keys(programs: str) -> Result:
    """Run over all routes, which are on one listener then, as each kind of caller."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "api_keys_file": str(keys_file(Path(folder) / "keys.json", ant={"pins": 1})),
            "admin_key_hashes": [hash_of(ADMIN_KEY)],
            "metrics_key_hashes": [hash_of(METRICS_KEY)],
            **LIMITS,
        }
        async with fake_server(template=TEMPLATE, **config) as server:
            url, served = server.url, frozenset({200})
            runs = [
                Run("admin", url, ADMIN_KEY, checks=(*CHECKS, "ignored_auth")),
                Run("tenant", url, key_of("ant")),
                _refused("scraper", url, METRICS_KEY),
                _refused("nobody", url, None, served),
                _refused("a wrong key", url, "sk-of-nobody", served),
                Run("operator", server.admin_url),
            ]  # fmt: skip
            return await _all(programs, runs, ADMIN_KEY)


def _refused(title: str, url: str, key: str | None, never: frozenset[int] = frozenset()) -> Run:
    return Run(title, url, key, REFUSED_EXAMPLES, REFUSED_CHECKS, "fuzzing", never)


def point_without_keys() -> Result:
    """No 5xx and nothing undocumented on a server without keys."""
    with environment(SCHEMATHESIS) as programs:
        return asyncio.run(without_keys(str(programs)))


def point_with_keys() -> Result:
    """The same with keys, whoever asks."""
    with environment(SCHEMATHESIS) as programs:
        return asyncio.run(with_keys(str(programs)))


POINTS = [
    Point("4", "schemathesis finds no 5xx and nothing undocumented", point_without_keys),
    Point("4k", "the same with keys: admin, tenant, scraper, nobody", point_with_keys),
]
