"""The distributions of SGLang's serving benchmark: Poisson arrivals over a few adapters."""

from __future__ import annotations

import numpy as np

from lorax_router.simulator.trace import ClientKind, Trace, trace_of_clients


def sglang(
    law: str = "skewed",
    *,
    seed: int = 1,
    adapters: int = 8,
    alpha: float = 1.1,
    rate: float = 4.0,
    requests: int = 1000,
    prompt: tuple[int, int] = (512, 513),
    output: tuple[int, int] = (512, 513),
    rank: int = 16,
    clients: ClientKind = "tenants",
) -> Trace:
    """``sglang:skewed,adapters=8,alpha=1.1,rate=4,requests=1000,prompt=512-513,output=512-513``.

    ``uniform``: each request's adapter is drawn. ``distinct``: adapters in turns. ``skewed``:
    adapter i has the weight alpha ** -i, which is geometric.
    """
    rng = np.random.RandomState(seed)
    prompts = rng.randint(*prompt, requests)
    outputs = rng.randint(*output, requests)
    if law == "uniform":
        column = rng.randint(0, adapters, requests)
    elif law == "distinct":
        column = np.arange(requests) % adapters
    elif law == "skewed":
        weights = alpha ** -np.arange(adapters, dtype=np.float64)
        column = rng.choice(adapters, requests, p=weights / weights.sum())
    else:
        raise ValueError(f"SGLang has the laws uniform, distinct and skewed; not {law}")
    return trace_of_clients(
        f"sglang:{law}",
        times=np.cumsum(rng.exponential(1 / rate, requests)),
        clients=column,
        prompts=prompts,
        outputs=outputs,
        ranks=[rank] * adapters,
        kind=clients,
    )
