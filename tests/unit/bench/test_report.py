"""Results on disk, in a table, as plots and as a page that needs nothing beside it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from lorax_bench.document import (
    DocumentError,
    MeasuredRun,
    Results,
    compared,
    load,
    measured,
    save,
)
from lorax_bench.records import Record
from lorax_bench.report.lines import groups
from lorax_bench.report.markdown import renew
from lorax_bench.report.page import page
from lorax_bench.report.plots import NoPlotsError, png
from lorax_bench.report.table import show
from lorax_bench.requests import BenchRequest, Workload

ERROR = "HTTP 429: <b>too many</b> & more"


def make_run(
    rate: float = 10.0, *, adapters: int = 0, number: int = 0, failed: int = 0
) -> MeasuredRun:
    """A run of four requests of ten tokens, at so many tokens per second."""
    times = [place / rate for place in range(1, 41)]
    records = [
        Record(
            request=i, sent_s=0.0, token_times_s=times[i::4], prompt_tokens=3,
            adapter=i % adapters if adapters else None, error=ERROR if i < failed else None,
        )
        for i in range(4)
    ]  # fmt: skip
    request = BenchRequest(prompt_ids=(1, 2, 3), max_tokens=10)
    workload = Workload(name="test", requests=(request,) * 4, num_adapters=adapters)
    variant = f"{adapters} adapters" if adapters else "base"
    return measured(
        "ours", workload, records, variant=variant, round=number, peak_memory_bytes=3 << 30
    )


def make_results(*runs: MeasuredRun, **values: object) -> Results:
    return Results(
        title="a <title>", runs=runs, date="2026-11-27T00:00:00+00:00", machine={"cpu": "a CPU"},
        versions={"python": "3.11"}, commit="abc", command=["lorax-bench", "run"], **values,  # type: ignore[arg-type]
    )  # fmt: skip


def both(failed: int = 0) -> Results:
    base = [make_run(rate, number=i) for i, rate in enumerate((100.0, 80.0))]
    others = [make_run(r, adapters=2, number=i, failed=failed) for i, r in enumerate((90.0, 60.0))]
    return make_results(*base, *others, ratios=[compared("retention", others, base)])


def printed(found: Results, **options: bool) -> str:
    console = Console(file=io.StringIO(), width=160)
    show(found, console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    found = both(failed=1)
    save(found, tmp_path / "new" / "r.json")
    again = load(tmp_path / "new" / "r.json")
    assert (again.title, again.date, again.machine) == (found.title, found.date, found.machine)
    assert again.runs[3].figures.errors == {ERROR: 1}
    assert again.runs[0].figures.inter_token is not None
    assert again.runs[0].figures.inter_token.at(50) == pytest.approx(0.04)
    assert again.ratios[0].value == pytest.approx(150 / 180, rel=1e-5)
    save(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new" / "r.json").read_bytes()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 9}', '{"format": 1, "runs": [{}], "ratios": []}']
)
def test_a_file_that_holds_no_results_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DocumentError, match=r"x\.json"):
        load(tmp_path / "x.json")


def test_a_curve_is_one_line_of_the_file(tmp_path: Path) -> None:
    save(both(), tmp_path / "r.json")
    lines = (tmp_path / "r.json").read_text().splitlines()
    curves = [json.loads(line.split(": ", 1)[1].rstrip(",")) for line in lines if "curve_s" in line]
    assert len(curves) == 12
    assert {len(curve) for curve in curves} == {101}


def test_rounds_of_a_kind_are_one_line_with_their_median() -> None:
    base, others = groups(both().runs)
    assert (base.label, others.label) == ("base", "2 adapters")
    assert base.median("output_tokens_per_s") == pytest.approx(90.0)
    assert others.values("output_tokens_per_s") == pytest.approx([90.0, 60.0])


def test_levels_of_a_sweep_are_lines_of_their_own() -> None:
    runs = [replace(make_run(), concurrency=level) for level in (1, 2, 4)]
    assert [group.load for group in groups(runs)] == [1, 2, 4]
    assert [group.load for group in groups([replace(make_run(), rate=0.5)])] == [0.5]


def test_systems_of_several_names_are_told_apart() -> None:
    runs = [make_run(), replace(make_run(), system="theirs")]
    assert [group.label for group in groups(runs)] == ["ours, base", "theirs, base"]


def test_workloads_of_several_names_are_told_apart() -> None:
    runs = [make_run(), replace(make_run(), workload="other")]
    assert [group.label for group in groups(runs)] == ["test: base", "other: base"]


def test_the_table_has_rates_times_ratios_and_errors() -> None:
    text = printed(both(failed=1))
    assert "90.0 (80.0-100)" in text
    assert "45.0 / 45.0 / 45.0" in text  # ms: medians of rounds of 40 and 50
    assert "retention: 0.83 (rounds 0.75 to 0.90)" in text
    assert f"2 adapters: 2 x {ERROR}" in text
    assert "3.00" in text  # GiB


def test_each_adapter_has_a_line_where_it_is_asked_for() -> None:
    assert "by adapter" not in printed(both())
    text = printed(both(), by_adapter=True)
    assert text.count("by adapter") == 2


def test_plots_are_drawn_of_runs_and_of_sweeps() -> None:
    sweep = [replace(make_run(), concurrency=level) for level in (1, 2, 4)]
    for found in (both(), make_results(*sweep), make_results(make_run(failed=4))):
        assert png(found).startswith(b"\x89PNG")


class References(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]


def test_the_page_needs_nothing_beside_it() -> None:
    text = page(both(failed=1))
    parser = References()
    parser.feed(text)
    assert parser.found
    assert all(each.startswith("data:image/png;base64,") for each in parser.found)
    assert not {"script", "link", "iframe", "object", "b"} & parser.tags
    assert "@import" not in text
    assert "url(" not in text
    assert "a &lt;title&gt;" in text
    assert "&lt;b&gt;too many&lt;/b&gt; &amp; more" in text


def test_a_page_has_the_tables_of_the_files_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    save(both(), tmp_path / "results" / "r.json")
    page_of_text = tmp_path / "README.md"
    page_of_text.write_text(
        "before\n<!-- results: results/r.json -->\nold\n<!-- end of results -->\nafter\n"
    )
    text = renew(page_of_text)
    assert text.startswith("before\n<!-- results: results/r.json -->\n\na <title> (2026-11-27; ")
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert "| 2 adapters | 75.0 (60.0-90.0) |" in text
    assert "**0.83**" in text
    assert "old" not in text
    page_of_text.write_text(text)
    assert renew(page_of_text) == text


def test_plots_without_matplotlib_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(NoPlotsError, match="matplotlib"):
        png(both())
