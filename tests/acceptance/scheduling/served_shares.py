"""Fair shares on the real server: suites of VTC, scaled down to what a few cores serve."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.acceptance.harness import Point, Result
from tests.acceptance.scheduling.traffic import Job, Traffic, failed
from tests.helpers.server import Server

from lorax_router.core.policies.fair import LOAD_CHARGE, OUTPUT_WEIGHT, PROMPT_WEIGHT
from lorax_router.simulator.service import ServiceMeter, vtc_bound
from lorax_router.simulator.trace import Trace
from lorax_router.simulator.workloads.vtc import vtc

ADAPTERS = Path("examples/adapters").resolve()
NAMES = ("pirate", "json-only", "sentiment")
SUITES = ("overload", "on_off_overload", "poisson_short_long")
# A pool so small that order of arrival breaks the bound within the run.
NUM_BLOCKS, BLOCK_SIZE = 32, 16
# Of what the suite says: lengths, and the time between arrivals.
LENGTHS, TIMES = 1 / 8, 1 / 3
RUN_S = 90.0
MAX_GAP = 0.6


def scaled(suite: str, models: Sequence[str]) -> tuple[Trace, list[Job]]:
    """Return a suite, cut to the run, and its requests; each client has an adapter."""
    trace = vtc(suite, minutes=RUN_S / TIMES / 60)
    jobs = [
        Job(
            at=float(trace.times[i]) * TIMES,
            client=int(trace.clients[i]),
            model=models[int(trace.clients[i]) % len(models)],
            num_prompt=max(int(trace.prompts[i] * LENGTHS), 1),
            num_output=max(int(trace.outputs[i] * LENGTHS), 1),
            key=_key(int(trace.clients[i])),
        )
        for i in range(len(trace))
    ]
    return trace, jobs


def _key(client: int) -> str:
    return f"key-of-tenant-{client}"


def keys_file(folder: Path, weights: Sequence[float]) -> Path:
    """Write a keys file with a tenant for each weight."""
    path = folder / "keys.toml"
    parts = (
        f'[tenants.tenant-{i}]\nkeys = ["{_key(i)}"]\nweight = {weight}\n'
        for i, weight in enumerate(weights)
    )
    path.write_text("\n".join(parts))
    return path


def service_gap(trace: Trace, jobs: Sequence[Job]) -> float:
    """Return the largest gap between waiting clients, of what clients saw.

    A prompt is served with its first token; until then its client waits.
    """
    meter = ServiceMeter(trace.client_weights, sorted(set(trace.clients.tolist())), RUN_S)
    for now, order, job in heapq.merge(*map(_events, jobs), key=_when):
        if order == 0:
            meter.waits(job.client)
            continue
        amount = OUTPUT_WEIGHT + (PROMPT_WEIGHT * job.num_prompt if order == 1 else 0)
        meter.serve({job.client: amount}, now)
        if order == 1:
            meter.leaves(job.client)
    return meter.gap


def _when(event: tuple[float, int, Job]) -> tuple[float, int]:
    return event[:2]


def _events(job: Job) -> Iterator[tuple[float, int, Job]]:
    if job.sent_at:
        yield job.sent_at, 0, job
    for i, at in enumerate(job.token_times):
        yield at, min(i + 1, 2), job


def _gap(suite: str, policy: str) -> tuple[float, int, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        trace, jobs = scaled(suite, NAMES)
        options = [
            part for name in NAMES for part in ("--lora-modules", f"{name}={ADAPTERS / name}")
        ]
        with Server(
            "--scheduling-policy", policy, "--num-blocks", str(NUM_BLOCKS),
            "--block-size", str(BLOCK_SIZE), "--max-concurrent-requests", "4096",
            "--adapter-local-root", str(ADAPTERS), *options,
            "--api-keys-file", str(keys_file(Path(folder), trace.tenant_weights)),
        ) as server:  # fmt: skip
            Traffic(server.url).run(jobs, RUN_S)
    num_tokens = sum(len(job.token_times) for job in jobs)
    return service_gap(trace, jobs), num_tokens, failed(jobs)


def point_shares() -> Result:
    """Gaps under ``fair`` beside the bound and those in order of arrival."""
    plain = vtc_bound(int(256 * LENGTHS), NUM_BLOCKS * BLOCK_SIZE)
    bound = 1.5 * plain + LOAD_CHARGE
    short, figures = [], []
    for suite in SUITES:
        (fcfs, before, wrong), (fair, tokens, also) = (_gap(suite, p) for p in ("fcfs", "fair"))
        figures.append(f"{suite} {fair:,.0f} ({fair / fcfs:.2f} of fcfs' {fcfs:,.0f})")
        print(f"    {figures[-1]}; tokens {tokens} and {before}; {wrong + also}", flush=True)
        if not fair <= min(bound, MAX_GAP * fcfs) or wrong or also:
            short.append(suite)
    figure = f"bound {bound:,.0f}; {', '.join(figures)}"
    return Result(not short, f"{figure}; short: {', '.join(short)}" if short else figure)


POINTS = [Point("1v", "three of VTC's suites on the real server", point_shares)]
