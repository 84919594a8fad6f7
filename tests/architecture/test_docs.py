"""Generated pages are up to date, and what texts point at exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from lorax_bench.report import markdown
from lorax_contract.exit_codes import ExitCode, hint
from lorax_launcher import migration
from lorax_launcher.docs import render_page
from lorax_shard.model.families import ENCODER_FAMILIES, TESTED_FAMILIES

ROOT = Path(__file__).parents[2]
# All that LoRAX's HTTP interface has.
LORAX_ROUTES = """
/ /invocations /generate /generate_stream /v1/completions /v1/chat/completions /v1/embeddings
/embed /classify /classify_batch /tokenize /health /ping /startup /info /metrics /docs
/api-doc/openapi.json
"""
LORAX_FIELDS = """
adapter_id adapter_source merged_adapters adapter_parameters api_token best_of temperature
repetition_penalty frequency_penalty presence_penalty top_k top_p typical_p do_sample max_new_tokens
ignore_eos_token return_full_text stop truncate watermark details decoder_input_details
return_k_alternatives apply_chat_template seed response_format schema
"""
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.md")]
)


def test_cli_page_is_up_to_date() -> None:
    assert (ROOT / "docs/cli.md").read_text() == render_page(), "run `make docs`"


def test_migration_page_is_up_to_date() -> None:
    page = (ROOT / "docs/migration.md").read_text()
    assert page == migration.renew(page), "run `make docs`"


def test_migration_page_has_every_route_and_field_of_lorax() -> None:
    page = (ROOT / "docs/migration.md").read_text()
    section = page.partition("## From TGI")[0]
    routes, _, fields = section.partition("### Routes")[2].partition("### Fields")
    for name, rows in ((LORAX_ROUTES, routes), (LORAX_FIELDS, fields)):
        named = {each for row in rows.splitlines() for each in re.findall(r"`([^`]+)`", row)}
        named = {each.removeprefix("POST ").removeprefix("GET ") for each in named}
        assert set(name.split()) <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_results_are_those_of_their_files(page: Path) -> None:
    assert page.read_text() == markdown.renew(page), "run `make docs`"


@pytest.mark.parametrize("code", list(ExitCode), ids=lambda code: code.name)
def test_each_exit_code_has_a_hint_whose_pages_exist(code: ExitCode) -> None:
    text = hint(code)
    assert bool(text) == (code is not ExitCode.OK)
    for page in re.findall(r"docs/[\w.-]+\.md", text):
        assert (ROOT / page).is_file(), f"{code.name} points at {page}"


def test_every_lint_exception_has_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("\nignore = [\n")[1].split("\n]\n")[0].splitlines()
    assert block[0].lstrip().startswith("#")
    config = tomllib.loads(text)["tool"]["ruff"]["lint"]
    assert len(config["ignore"]) == len(re.findall(r'"[A-Z]+\d+"', "\n".join(block)))


def test_models_page_lists_the_tested_families() -> None:
    lines = (ROOT / "docs/models.md").read_text().splitlines()
    for families in (TESTED_FAMILIES, ENCODER_FAMILIES):
        assert ", ".join(f"`{family}`" for family in sorted(families)) in lines
