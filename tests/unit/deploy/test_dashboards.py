"""Dashboard and alerts speak of metrics that there are, and of labels that these have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.dashboard import PATH, ROWS, text

ROOT = Path(__file__).parents[3]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
# Of histograms and summaries, beside the name itself.
_SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "summary": ("_count", "_sum")}
_ROW = re.compile(r"^\| `([a-z_:]+)` \| (\w+) \| (.*?) \|", re.MULTILINE)
_SELECTED = re.compile(r"((?:lorax_|vllm:)[a-z_:]+)(?:\{([^}]*)\})?")
_BY = re.compile(r"\b(?:by|on) \(([^)]*)\)")
# Those that Prometheus adds, and of histograms.
_ALWAYS = {"instance", "job", "le"}


def known() -> dict[str, set[str]]:
    """Return the labels of each series, as the page of metrics has them, which is generated."""
    found = {}
    for name, kind, labels in _ROW.findall((ROOT / "docs/metrics.md").read_text()):
        for suffix in _SUFFIXES.get(kind, ("",)):
            found[name + suffix] = set(re.findall(r"`(\w+)`", labels))
    return found


def faults(expression: str) -> Iterator[str]:
    """Say what of an expression is not there."""
    series, labels = known(), set(_ALWAYS)
    for name, matchers in _SELECTED.findall(expression):
        if name not in series:
            yield f"there is no {name}"
        own = series.get(name, set()) | _ALWAYS
        labels |= own
        for label in re.findall(r"(\w+)\s*=", matchers):
            if label not in own:
                yield f"{name} has no label {label}"
    for group in _BY.findall(expression):
        for label in re.findall(r"\w+", group):
            if label not in labels:
                yield f"nothing has a label {label}"


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return list(group["rules"])


def panels() -> list[dict[str, Any]]:
    return [each for each in json.loads(PATH.read_text())["panels"] if each["type"] != "row"]


def test_the_dashboard_is_up_to_date() -> None:
    assert PATH.read_text() == text(), "run `python -m deploy.dashboard`"
    assert len(panels()) == sum(map(len, ROWS.values()))


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_panels_speak_of_what_there_is(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expression = target["expr"]
        assert "@" not in expression
        assert list(faults(expression)) == []
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert label in {*re.findall(r"\w+", " ".join(_BY.findall(expression))), "instance"}


def test_panels_lie_side_by_side() -> None:
    """No two share a place, and none reaches over the edge."""
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(PATH.read_text())["panels"]:
        at = panel["gridPos"]
        place = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not taken & place
        assert at["x"] + at["w"] <= 24
        taken |= place


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_alerts_speak_of_what_there_is_and_have_a_runbook_line(rule: dict[str, Any]) -> None:
    assert list(faults(rule["expr"])) == []
    assert rule["labels"]["severity"] in ("page", "ticket")
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert rule["alert"] in headings
    assert anchor == rule["alert"].lower()


def test_the_runbook_has_no_line_for_what_is_no_alert() -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in rules()]


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("rate(lorax_request_counts[5m])", "there is no lorax_request_counts"),
        ('lorax_queue_length{tenant="x"}', "lorax_queue_length has no label tenant"),
        ("sum by (adapter) (lorax_queue_length)", "nothing has a label adapter"),
        ("lorax_request_duration > 1", "there is no lorax_request_duration"),
    ],
)
def test_what_is_not_there_is_noticed(expression: str, fault: str) -> None:
    assert list(faults(expression)) == [fault]
