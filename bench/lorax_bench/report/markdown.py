"""Results in a page of text: a table below a line that names their file."""

from __future__ import annotations

import re
from pathlib import Path

from lorax_bench.document import Results, load
from lorax_bench.report.lines import columns, groups

# The path is relative to the page.
_PLACE = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
_FACTS = ("cpu", "cores", "load average before")


def table(found: Results) -> str:
    """Return results as a table, with what they are of above it and ratios below."""
    lines = groups(found.runs)
    parts = columns(lines)
    rows = [[part.title for part in parts], ["---"] * len(parts)]
    rows += [[part.text(line) for part in parts] for line in lines]
    facts = [f"{name}: {found.machine[name]}" for name in _FACTS if name in found.machine]
    about = "; ".join([found.date[:10], f"commit {found.commit}", *facts])
    text = "\n".join("| " + " | ".join(_cell(each) for each in row) + " |" for row in rows)
    ratios = "".join(
        f"\n- {each.name}: **{each.value:.2f}** (rounds {each.low:.2f} to {each.high:.2f})"
        for each in found.ratios
    )
    return f"{found.title} ({about})\n\n{text}\n" + (f"{ratios}\n" if ratios else "")


def renew(page: Path) -> str:
    """Return the text of a page with each of its tables of results made anew from its file."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table(load(page.parent / match[2]))}\n{match[3]}"

    return _PLACE.sub(made, page.read_text())


def _cell(text: str) -> str:
    return text.replace("|", "&#124;")
