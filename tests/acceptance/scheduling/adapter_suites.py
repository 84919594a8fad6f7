"""S-LoRA's suites: fair shares beside order of arrival and LoRAX's rule, over the virtual clock."""

from __future__ import annotations

from tests.acceptance.harness import Point, Result
from tests.acceptance.scheduling.simulated import named

# Adapters, requests a second and the skew; 32 slots, a server for about 1.5 requests a second.
_SUITES = (
    "n=100,rate=1", "n=100,rate=1.5", "n=100,rate=2",
    "n=1000,rate=1", "n=1000,rate=1.5", "n=1000,rate=2", "n=1000,rate=1.5,alpha=0.3",
)  # fmt: skip
_POOL = 10_000
_LEAST_THROUGHPUT = 0.97


def point_suites() -> Result:
    """Clients below their share win, more requests and clients are served well, little is lost."""
    short, least = [], 1.0
    for suite in _SUITES:
        fair, *others = (
            named(f"slora:s1,{suite}", policy, _POOL).figures
            for policy in ("fair", "fcfs", "lorax")
        )
        for name, each in zip(("fair", "fcfs", "lorax"), (fair, *others), strict=True):
            first, light = each["first_token_s"], each["light_clients_first_token_s"]["p99"]
            print(
                f"    {suite} {name}: {each['tokens_per_s']:.0f} tokens/s, first token "
                f"{first['p50']:.2f} / {first['p99']:.2f} s, below the share {light:.2f} s, SLO "
                f"{each['slo_by_request']:.2f}, {each['slo_by_client']:.2f}",
                flush=True,
            )
        ratio = fair["tokens_per_s"] / max(each["tokens_per_s"] for each in others)
        least = min(least, ratio)
        is_ok = ratio >= _LEAST_THROUGHPUT
        for other in others:
            is_ok &= (
                fair["light_clients_first_token_s"]["p99"]
                <= other["light_clients_first_token_s"]["p99"]
            )
            is_ok &= fair["slo_by_request"] >= other["slo_by_request"]
            is_ok &= fair["slo_by_client"] >= other["slo_by_client"]
        if not is_ok:
            short.append(suite)
    figure = f"{len(_SUITES)} suites, throughput at least {least:.3f}"
    return Result(not short, f"{figure}; short: {'; '.join(short)}" if short else figure)


POINTS = [Point("2", "up to 1,000 adapters in 32 slots, beside fcfs and lorax", point_suites)]
