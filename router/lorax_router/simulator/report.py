"""What came of runs, as plain values: the same runs give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from lorax_router.core.policies.fair import LOAD_CHARGE, OUTPUT_WEIGHT, PROMPT_WEIGHT
from lorax_router.simulator.driver import SimulatedRun
from lorax_router.simulator.service import vtc_bound
from lorax_router.simulator.trace import Floats, Ints, Trace

# Seconds until the first token that count as served well, as in S-LoRA's evaluation.
DEFAULT_SLO_S = 6.0
_DIGITS = 6


def report(
    runs: Sequence[SimulatedRun], *, seed: int | None, slo_s: float = DEFAULT_SLO_S
) -> dict[str, Any]:
    """Return all of a comparison: workload, server, and each policy's figures."""
    trace, server = runs[0].trace, runs[0].server
    cost = server.cost
    return {
        "workload": _workload(trace, seed),
        "server": {
            "name": server.name,
            "cost": {name: getattr(cost, name) for name in cost.__dataclass_fields__},
            "kv_tokens": server.num_blocks * server.block_size,
            "max_step_tokens": server.max_step_tokens,
            "max_rows": server.max_rows,
            "depth": server.depth,
            "batching": server.batching,
            "target_itl_ms": server.target_itl_ms,
            "max_kv_read": server.max_kv_read,
            "max_partial_prompts": server.max_partial_prompts,
            "max_adapters": server.max_adapters,
        },
        "slo_s": slo_s,
        "bound": fairness_bound(runs[0]),
        "policies": {run.policy: figures(run, slo_s) for run in runs},
    }


def as_json(values: Mapping[str, Any]) -> bytes:
    """Write a report: keys sorted, numbers to six digits."""
    options = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(_rounded(values), option=options)


def fairness_bound(run: SimulatedRun) -> dict[str, float]:
    """Return VTC's bound for this workload and pool, and the one that is held here."""
    plain = vtc_bound(int(run.trace.prompts.max()), run.server.num_blocks * run.server.block_size)
    return {"vtc": plain, "held": 1.5 * plain + LOAD_CHARGE}


def figures(run: SimulatedRun, slo_s: float = DEFAULT_SLO_S) -> dict[str, Any]:
    """Return one policy's figures."""
    trace, meter = run.trace, run.meter
    waits = run.first_token_at - trace.times
    served = waits <= slo_s
    duration = run.end - float(trace.times[0])
    num_tokens = int(trace.prompts.sum() + trace.outputs.sum())
    pair = meter.gap_pair
    return {
        "duration_s": duration,
        "tokens_per_s": num_tokens / duration,
        "output_tokens_per_s": int(trace.outputs.sum()) / duration,
        "requests": len(trace),
        "steps": len(run.step_seconds),
        "busy": float(run.step_seconds.sum()) / duration,
        "step_s": _quantiles(run.step_seconds),
        "computed_again": run.num_computed - num_computed_once(trace),
        "preemptions": run.num_preemptions,
        "swapped_out": run.num_swaps,
        "adapter_loads": run.num_loads,
        "first_token_s": _quantiles(waits),
        "between_tokens_s": _quantiles(run.token_gaps),
        "whole_request_s": _quantiles(run.ended_at - trace.times),
        "slo_by_request": float(served.mean()),
        "slo_by_client": float(np.mean(_by_group(served, trace.clients, np.mean))),
        "service_gap": meter.gap,
        "service_gap_between": [trace.client_names[each] for each in pair] if pair else [],
        "light_clients_first_token_s": _quantiles(waits[light(trace)]),
        "classes": _groups(waits, served, trace.priorities),
        "tenants": _named(waits, served, trace.tenants, trace.tenant_names),
        "adapters": _named(waits, served, trace.adapters, trace.adapter_names),
        "service": {
            "window_s": meter.window_s,
            "clients": {
                trace.client_names[client]: [row[place] for row in meter.series]
                for place, client in enumerate(meter.compared)
            },
        },
    }


def num_computed_once(trace: Trace) -> int:
    """Return the tokens that are computed if nothing is computed twice: no output's last."""
    return int(trace.prompts.sum() + trace.outputs.sum()) - len(trace)


def light(trace: Trace) -> npt.NDArray[np.bool_]:
    """Say of each request whether its client asks for less than its share of what all ask for."""
    work = PROMPT_WEIGHT * trace.prompts + OUTPUT_WEIGHT * trace.outputs
    weights = np.array(trace.client_weights)
    asked = np.bincount(trace.clients, weights=work, minlength=len(weights))
    weights = np.where(asked > 0, weights, 0.0)
    return np.asarray((asked < asked.sum() * weights / weights.sum())[trace.clients])


def _workload(trace: Trace, seed: int | None) -> dict[str, Any]:
    return {
        "name": trace.name,
        "seed": seed,
        "requests": len(trace),
        "duration_s": float(trace.times[-1]),
        "prompt_tokens": int(trace.prompts.sum()),
        "output_tokens": int(trace.outputs.sum()),
        "clients": trace.client_kind,
        "num_tenants": len(np.unique(trace.tenants)),
        "num_adapters": len(np.unique(trace.adapters[trace.adapters > 0])),
    }


def _quantiles(values: npt.NDArray[Any]) -> dict[str, float | None]:
    if not len(values):
        return {"mean": None, "p50": None, "p99": None, "max": None}
    p50, p99 = np.percentile(values, (50, 99))
    return {
        "mean": float(values.mean(dtype=np.float64)),
        "p50": float(p50),
        "p99": float(p99),
        "max": float(values.max()),
    }


def _by_group(values: npt.NDArray[Any], groups: Ints, reduce: Any) -> list[float]:
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    return [float(reduce(each)) for each in np.split(values[order], starts)]


def _groups(waits: Floats, served: npt.NDArray[np.bool_], groups: Ints) -> dict[str, Any]:
    return {
        str(each): _of_group(waits[groups == each], served[groups == each])
        for each in np.unique(groups)
    }


def _named(
    waits: Floats, served: npt.NDArray[np.bool_], groups: Ints, names: Sequence[str]
) -> dict[str, Any]:
    order = np.argsort(groups, kind="stable")
    found, starts = np.unique(groups[order], return_index=True)
    parts = zip(np.split(waits[order], starts[1:]), np.split(served[order], starts[1:]))
    return {names[each]: _of_group(*part) for each, part in zip(found, parts)}


def _of_group(waits: Floats, served: npt.NDArray[np.bool_]) -> dict[str, Any]:
    return {
        "requests": len(waits),
        "first_token_s": _quantiles(waits),
        "slo": float(served.mean()),
    }


Rounded = dict[str, Any] | list[Any] | float | int | str | None


def _rounded(value: Any) -> Rounded:
    """Return plain values with floats to so many digits: what is left of noise goes."""
    if isinstance(value, Mapping):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    return value  # type: ignore[no-any-return]
