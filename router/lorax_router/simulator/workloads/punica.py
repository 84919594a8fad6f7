"""Punica's workload: all requests at once, log-normal prompts, four laws of popularity."""

from __future__ import annotations

from math import ceil, floor, sqrt

import numpy as np

from lorax_router.simulator.trace import ClientKind, Trace, trace_of_clients


def popularity(law: str, requests: int, ratio: float = 1.5) -> list[int]:
    """Return how many requests each adapter has.

    ``distinct``: one each. ``identical``: one adapter. ``uniform``: ceil(sqrt(requests))
    adapters, as equal as can be. ``skewed``: geometric, each adapter ``ratio`` times the next.
    """
    if law == "distinct":
        return [1] * requests
    if law == "identical":
        return [requests]
    if law == "uniform":
        n = ceil(sqrt(requests))
        least, more = divmod(requests, n)
        return [least + (i < more) for i in range(n)]
    if law == "skewed":
        counts: list[int] = []
        size = 1.0
        while sum(counts) + floor(size) < requests:
            counts.append(floor(size))
            size *= ratio
        return sorted([*counts, requests - sum(counts)], reverse=True)
    raise ValueError(f"Punica has the laws distinct, identical, uniform and skewed; not {law}")


def punica(
    law: str = "skewed",
    *,
    seed: int = 0xABCDABCD987,
    requests: int = 1000,
    ratio: float = 1.5,
    maxlen: int = 2048,
    rank: int = 16,
    clients: ClientKind = "tenants",
) -> Trace:
    """``punica:skewed,requests=1000,ratio=1.5,maxlen=2048,rank=16``.

    A prompt has -1 + 18 * exp(0.8 * Z) tokens, the whole sequence uniformly up to ``maxlen``,
    at least two more than the prompt. The default seed is the published one.
    """
    rng = np.random.Generator(np.random.PCG64(seed=seed))
    prompts = np.minimum(18.0 * np.exp(0.8 * rng.standard_normal(requests)) - 1.0, maxlen - 2)
    totals = np.maximum(prompts.astype(np.int64) + 2, rng.integers(0, maxlen, requests))
    counts = popularity(law, requests, ratio)
    column = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    np.random.Generator(np.random.PCG64(seed=seed)).shuffle(column)
    # A prompt below one token would be none.
    lengths = np.maximum(prompts.astype(np.int64), 1)
    return trace_of_clients(
        f"punica:{law}",
        times=np.zeros(requests),
        clients=column,
        prompts=lengths,
        outputs=totals - prompts.astype(np.int64),
        ranks=[rank] * len(counts),
        kind=clients,
    )
