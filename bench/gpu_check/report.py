"""What a stage found: written to its file at each change, so that a stage that is cut keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED, RUNNING = "ok", "failed", "skipped", "running"


class Report:
    """Tables, notes and the end of one stage."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.data: dict[str, Any] = {
            "status": RUNNING, "text": "", "notes": [], "tables": [],
        }  # fmt: skip
        self._write()

    def table(self, title: str, columns: Sequence[str]) -> None:
        """Begin a table."""
        self.data["tables"].append({"title": title, "columns": list(columns), "rows": []})
        self._write()

    def row(self, *values: object) -> None:
        """Add a line to the last table; None is an empty cell."""
        table = self.data["tables"][-1]
        assert len(values) == len(table["columns"]), "a cell a column"
        table["rows"].append(list(values))
        self._write()
        print(" | ".join(map(cell, values)), flush=True)

    def note(self, text: str) -> None:
        """Add a remark."""
        self.data["notes"].append(text)
        self._write()
        print(text, flush=True)

    def end(self, status: str, text: str = "") -> None:
        """Say how the stage ended; the first failure counts."""
        if self.data["status"] in (RUNNING, OK):
            self.data.update(status=status, text=text)
        self._write()

    def _write(self) -> None:
        scratch = self._path.with_suffix(".part")
        scratch.write_text(json.dumps(self.data, default=str))
        scratch.replace(self._path)


def cell(value: object) -> str:
    """Return a value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def to_markdown(document: Mapping[str, Any]) -> str:
    """Return the page of a whole check."""
    machine = document["machine"]
    lines = [
        f"# GPU check of {machine['device']}",
        "",
        "Written by `make gpu-check`"
        + (" in its small form: it shows that the check runs, no speed." if document["small"] else "."),
        "",
        "| what | value |", "| --- | --- |",
        *(f"| {name} | {cell(value)} |" for name, value in machine.items()),
        "",
        "| stage | end | seconds | of | |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for stage in document["stages"]:
        values = (stage["title"], stage["status"], stage["seconds"], stage["budget_s"])
        lines.append(f"| {' | '.join(map(cell, values))} | {cell(stage['text'][-400:])} |")
    for stage in document["stages"]:
        if stage["tables"] or stage["notes"]:
            lines += ["", f"## {stage['title']}"]
        lines += [line for note in stage["notes"] for line in ("", note)]
        for table in stage["tables"]:
            lines += ["", f"### {table['title']}", ""]
            lines.append(f"| {' | '.join(table['columns'])} |")
            lines.append("|" + " --- |" * len(table["columns"]))
            lines += [f"| {' | '.join(map(cell, row))} |" for row in table["rows"]]
    return "\n".join(lines) + "\n"
