"""Results as one HTML page that needs nothing beside it: styles and plots lie within."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lorax_bench.document import Results
from lorax_bench.report.lines import columns, groups
from lorax_bench.report.plots import png

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .75rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
.error { color: #a00; }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #ddd; } img { filter: invert(.9) hue-rotate(180deg); }
}
"""


def page(found: Results) -> str:
    """Return the page; raises NoPlotsError where nothing can draw."""
    lines = groups(found.runs)
    parts = columns(lines)
    image = base64.b64encode(png(found)).decode()
    ratios = [
        (each.name, f"{each.value:.2f}", f"{each.low:.2f} to {each.high:.2f}")
        for each in found.ratios
    ]
    errors = [
        f"<li>{_text(line.label)}: {times} × {_text(words)}</li>"
        for line in lines
        for words, times in line.errors.items()
    ]
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f"<title>{_text(found.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{_text(found.title)}</h1>",
        f'<p><img alt="plots of these results" src="data:image/png;base64,{image}"></p>',
        _table([part.title for part in parts], ([part.text(line) for part in parts] for line in lines)),
        "<p>Times are p50 / p90 / p99. Figures are medians over rounds, bounds in brackets.</p>",
        _table(["ratio", "of the medians", "by round"], ratios) if ratios else "",
        f'<ul class="error">{"".join(errors)}</ul>' if errors else "",
        _facts(found),
        "</body>\n</html>\n",
    ])  # fmt: skip


def save_page(found: Results, path: Path) -> None:
    """Write the page to a file; raises NoPlotsError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(found))


def _facts(found: Results) -> str:
    about: Mapping[str, str] = {
        "date": found.date, "commit": found.commit or "none", "command": " ".join(found.command),
        **found.machine, **found.versions,
    }  # fmt: skip
    return "<h2>Where</h2>\n" + _table(["what", "value"], about.items())


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _text(value: str) -> str:
    return html.escape(value)
