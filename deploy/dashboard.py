"""Writes deploy/grafana/lorax.json, a dashboard for Grafana: ``python -m deploy.dashboard``.

Rows of panels, each with what it tells and its expressions; the rest is Grafana's form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "grafana" / "lorax.json"
# All panels speak of the servers that are chosen at the top.
_OF = '{instance=~"$instance"}'
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph: its title, what it tells, its unit, and legends with expressions."""

    title: str
    tells: str
    unit: str
    # `@` in an expression stands for the chosen servers, as `{...}`; `@,` for more labels behind it.
    lines: tuple[tuple[str, str], ...]
    is_stacked: bool = False


def quantiles(name: str, *shares: float, by: str = "") -> tuple[tuple[str, str], ...]:
    """Return lines of a histogram's quantiles, for each value of a label if one is named."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return tuple(
        (
            f"p{round(100 * share)}{legend}",
            f"histogram_quantile({share}, sum by ({labels}) (rate({name}_bucket@[$__rate_interval])))",
        )
        for share in shares
    )


def rate(name: str, by: str = "") -> str:
    """Return a counter's rate, summed over servers."""
    return f"sum{f' by ({by})' if by else ''} (rate({name}@[$__rate_interval]))"


def ratio(part: str, whole: str) -> str:
    """Return the rate of one counter in that of another."""
    return f"{rate(part)} / {rate(whole)}"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Latency": (
        Panel("Time to first token", "Queue, adapter and prompt together.", "s",
              quantiles("lorax_request_time_to_first_token_duration", 0.5, 0.95, 0.99)),
        Panel("Between tokens", "What a reader of a stream sees.", "s",
              quantiles("lorax_request_inter_token_duration", 0.5, 0.95, 0.99)),
        Panel("Whole requests", "From receipt to the last token.", "s",
              quantiles("lorax_request_duration", 0.5, 0.95, 0.99)),
        Panel("Wait for the first step", "Grows first when there is too much to do.", "s",
              quantiles("lorax_request_queue_duration", 0.5, 0.95)),
        Panel("Steps", "From sending a step to its answer; prefill: with new requests.", "s",
              quantiles("lorax_batch_inference_duration", 0.5, 0.95, by="method")),
        Panel("Validation and tokenizers", "The wait for a tokenizer included.", "s",
              quantiles("lorax_request_validation_duration", 0.5, 0.95)),
    ),
    "Throughput": (
        Panel("Tokens", "Generated, and prompts whose first token is there.", "short", (
            ("generated/s", rate("vllm:generation_tokens_total")),
            ("prompt/s", rate("vllm:prompt_tokens_total")),
        )),
        Panel("Requests", "Received, and answered in full.", "reqps", (
            ("received", rate("lorax_request_count")), ("answered", rate("lorax_request_success")),
        )),
        Panel("Failures", "By what went wrong.", "reqps",
              (("{{err}}", rate("lorax_request_failure", "err")),), is_stacked=True),
    ),
    "The batch": (
        Panel("Requests", "What runs, waits, or waits for its adapter.", "short", (
            ("running", "sum (lorax_requests_running@)"),
            ("waiting", "sum (lorax_requests_waiting@)"),
            ("resolving", "sum (lorax_requests_resolving@)"),
        )),
        Panel("Tokens of a step", "Computed in the latest step, and what prompts could have of it.", "short", (
            ("computed", "avg (lorax_batch_step_tokens@)"),
            ("prompts could have", "avg (lorax_batch_prompt_limit_tokens@)"),
        )),
        Panel("Steps", "With new requests, and without.", "ops",
              (("{{method}}", rate("lorax_batch_inference_count", "method")),)),
        Panel("Requests that gave way", "They are computed again, or moved to host memory.", "ops", (
            ("all", rate("lorax_requests_preempted")), ("moved", rate("lorax_requests_swapped_out")),
        )),
        Panel("Drafted tokens that were kept", "Speculation; nothing where it is off.", "percentunit", (
            ("kept", ratio("vllm:spec_decode_num_accepted_tokens_total",
                           "vllm:spec_decode_num_draft_tokens_total")),
        )),
        Panel("What a step costs", "As fitted to the latest steps, by unit of work.", "s",
              (("{{unit}}", "avg by (unit) (lorax_step_cost_seconds@)"),)),
    ),
    "KV cache": (
        Panel("In use", "Share of the pool.", "percentunit", (("{{instance}}", "lorax_kv_usage_ratio@"),)),
        Panel("Prompt tokens that were cached", "Of requests as they enter.", "percentunit", (
            ("hits", ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")),
        )),
        Panel("Host memory", "Blocks of requests that gave way, and of prefixes.", "short", (
            ("requests", "sum (lorax_kv_host_blocks_held@)"),
            ("prefixes", "sum (lorax_kv_host_blocks_cached@)"),
            ("all", "sum (lorax_kv_host_blocks@)"),
        )),
    ),
    "Adapters": (
        Panel("By state", "As in GET /v1/adapters.", "short",
              (("{{state}}", "sum by (state) (lorax_adapters@)"),), is_stacked=True),
        Panel("Slots", "Adapters that are on the shards, of those that may be.", "short", (
            ("held", "sum (lorax_adapter_slots_held@)"), ("all", "sum (lorax_adapter_slots@)"),
        )),
        Panel("Memory", "Bytes on the fullest rank.", "bytes", (
            ("held", "max (lorax_adapter_bytes_held@)"), ("may be held", "max (lorax_adapter_bytes@)"),
        )),
        Panel("Cold starts", "Seconds that requests spent on it, by phase.", "s",
              quantiles("lorax_adapter_cold_start_duration", 0.95, by="phase")),
        Panel("Requests by adapter", "The ten that are used most.", "reqps", (
            ("{{adapter}}", f"topk(10, {rate('lorax_adapter_request_count', 'adapter')})"),
        )),
        Panel("Tokens by adapter", "The ten that generate most.", "short", (
            ("{{adapter}}", f"topk(10, {rate('lorax_adapter_generated_tokens', 'adapter')})"),
        )),
    ),
    "Tenants": (
        Panel("Tokens", "Prompts and outputs.", "short",
              (("{{tenant}} {{kind}}", rate("lorax_tenant_tokens", "tenant, kind")),), is_stacked=True),
        Panel("Waiting", "Requests before their first step.", "short",
              (("{{tenant}}", "sum by (tenant) (lorax_tenant_queue_requests@)"),), is_stacked=True),
        Panel("Refused", "Quotas, queues, deadlines.", "reqps",
              (("{{tenant}} {{reason}}", rate("lorax_request_rejected", "tenant, reason")),)),
    ),
    "Failures of processes": (
        Panel("Shards lost", "Times that they died or hung.", "short",
              (("{{instance}}", "increase(lorax_shards_lost@[$__rate_interval])"),)),
        Panel("Until others took their place", "Streams pause so long.", "s",
              quantiles("lorax_shards_lost_duration", 0.5, 0.95)),
        Panel("Front processes", "Restarts of --http-workers.", "short",
              (("{{instance}}", "increase(lorax_front_restarts@[$__rate_interval])"),)),
    ),
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(_placed({"type": "row", "title": title, "collapsed": False}, 0, top, 24, 1))
        top += 1
        for number, panel in enumerate(row):
            left = number * _WIDTH % _COLUMNS
            panels.append(_placed(_graph(panel), left, top, _WIDTH, _HEIGHT))
            if left + _WIDTH == _COLUMNS or number + 1 == len(row):
                top += _HEIGHT
    for number, panel in enumerate(panels, start=1):
        panel["id"] = number
    return {
        "title": "lorax-py", "uid": "lorax-py", "schemaVersion": 39, "version": 1, "editable": True,
        "tags": ["lorax"], "refresh": "15s", "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_sources(), _instances()]}, "panels": panels,
    }  # fmt: skip


def _placed(panel: dict[str, Any], x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return panel | {"gridPos": {"x": x, "y": y, "w": width, "h": height}}


def _graph(panel: Panel) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
    custom = {"stacking": stacking, "fillOpacity": 25 if panel.is_stacked else 0, "lineWidth": 1}
    return {
        "type": "timeseries", "title": panel.title, "description": panel.tells,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {
                "refId": chr(ord("A") + number), "legendFormat": legend, "datasource": _DATASOURCE,
                "expr": expression.replace("@", _OF),
            }
            for number, (legend, expression) in enumerate(panel.lines)
        ],
    }  # fmt: skip


def _sources() -> dict[str, Any]:
    return {
        "name": "datasource",
        "type": "datasource",
        "query": "prometheus",
        "label": "Prometheus",
    }


def _instances() -> dict[str, Any]:
    query = "label_values(lorax_request_count, instance)"
    return {
        "name": "instance", "type": "query", "label": "Server", "datasource": _DATASOURCE,
        "query": {"query": query, "refId": "instances"}, "definition": query, "refresh": 2,
        "includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip


def text() -> str:
    """Return the file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
