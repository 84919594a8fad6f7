"""Reports as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def as_table(values: Mapping[str, Any]) -> Table:
    """Return a report's table: a row for each figure, a column for each policy."""
    policies: Mapping[str, Mapping[str, Any]] = values["policies"]
    table = Table(title=values["workload"]["name"])
    table.add_column("")
    for name in policies:
        table.add_column(name, justify="right")
    for label, path in _ROWS:
        table.add_row(label, *(_cell(_find(each, path)) for each in policies.values()))
    for group in ("classes", "tenants"):
        names = list(next(iter(policies.values()))[group])
        if 1 < len(names) <= _MAX_ROWS:
            for name in names:
                label = f"{_SINGULAR[group]} {name}: first token p50 / p99, s"
                cells = (each[group][name]["first_token_s"] for each in policies.values())
                table.add_row(label, *(f"{_cell(c['p50'])} / {_cell(c['p99'])}" for c in cells))
    bound = values["bound"]
    table.caption = (
        f"VTC's bound on the gap {_cell(bound['vtc'])}; held here {_cell(bound['held'])}; "
        f"SLO: first token within {_cell(values['slo_s'])} s"
    )
    return table


# Tenants beyond so many are in the JSON report only.
_MAX_ROWS = 10
_SINGULAR = {"classes": "class", "tenants": "tenant"}
_ROWS = (
    ("tokens/s, prompts and outputs", "tokens_per_s"),
    ("output tokens/s", "output_tokens_per_s"),
    ("device busy", "busy"),
    ("first token p50, s", "first_token_s.p50"),
    ("first token p99, s", "first_token_s.p99"),
    ("the same, clients below their share, s", "light_clients_first_token_s.p99"),
    ("between tokens p50, s", "between_tokens_s.p50"),
    ("between tokens p99, s", "between_tokens_s.p99"),
    ("SLO met, by request", "slo_by_request"),
    ("SLO met, by client", "slo_by_client"),
    ("largest service gap", "service_gap"),
    ("preemptions", "preemptions"),
    ("swapped out", "swapped_out"),
    ("tokens computed again", "computed_again"),
    ("adapter loads", "adapter_loads"),
)


def _find(values: Mapping[str, Any], path: str) -> Any:
    found: Any = values
    for name in path.split("."):
        found = found[name]
    return found


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"
