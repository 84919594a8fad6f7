"""S-LoRA's synthetic traces: adapters by a power law, Gamma arrivals, uniform lengths."""

from __future__ import annotations

import numpy as np

from lorax_router.simulator.trace import ClientKind, Trace, trace_of_clients

# Ranks of the published model settings; adapters go through them in turns.
SETTINGS = {
    "s1": (8,),
    "s2": (64, 32, 16, 8),
    "s3": (16,),
    "s4": (64, 32, 16),
    "s5": (32,),
    "s6": (64,),
}


def slora(
    suite: str = "s1",
    *,
    seed: int = 42,
    n: int = 100,
    alpha: float = 1.0,
    rate: float = 2.0,
    cv: float = 1.0,
    duration: float = 300.0,
    prompt: tuple[int, int] = (8, 512),
    output: tuple[int, int] = (8, 512),
    clients: ClientKind = "tenants",
) -> Trace:
    """``slora:s1,n=100,alpha=1,rate=2,cv=1,duration=300,prompt=8-512,output=8-512``.

    The index of a request's adapter is floor(n * X) with P(X < x) = x ** alpha: uniform for
    1, ever more for adapter 0 below it. Numbers are drawn in the order of the published
    generator (adapters, prompts, outputs, intervals), so that a seed gives its traces.
    With n=0 all ask for the base model.
    """
    if suite not in SETTINGS:
        raise ValueError(f"S-LoRA has the settings {', '.join(SETTINGS)}; not {suite}")
    rng = np.random.RandomState(seed)
    ranks = SETTINGS[suite]
    total = int(rate * duration)
    indices = (rng.power(alpha, total) * max(n, 1)).astype(np.int64)
    prompts = rng.randint(*prompt, total)
    outputs = rng.randint(*output, total)
    times = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, total))
    return trace_of_clients(
        f"slora:{suite},n={n}",
        times=times,
        clients=indices,
        prompts=prompts,
        outputs=outputs,
        ranks=[ranks[i % len(ranks)] for i in range(n)] or [0],
        kind=clients,
    )
