"""Generated pages are up to date, and what texts point at exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from lorax_contract.exit_codes import ExitCode, hint
from lorax_launcher.docs import render_page
from lorax_shard.model.families import TESTED_FAMILIES

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_cli_page_is_up_to_date() -> None:
    assert (ROOT / "docs/cli.md").read_text() == render_page(), "run `make docs`"


@pytest.mark.parametrize("code", list(ExitCode), ids=lambda code: code.name)
def test_each_exit_code_has_a_hint_whose_pages_exist(code: ExitCode) -> None:
    text = hint(code)
    assert bool(text) == (code is not ExitCode.OK)
    for page in re.findall(r"docs/[\w.-]+\.md", text):
        assert (ROOT / page).is_file(), f"{code.name} points at {page}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_that_texts_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z-]+)", page.read_text()))
        assert named <= targets, page.name


def test_every_lint_exception_has_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("\nignore = [\n")[1].split("\n]\n")[0].splitlines()
    assert block[0].lstrip().startswith("#")
    config = tomllib.loads(text)["tool"]["ruff"]["lint"]
    assert len(config["ignore"]) == len(re.findall(r'"[A-Z]+\d+"', "\n".join(block)))


def test_models_page_lists_the_tested_families() -> None:
    lines = (ROOT / "docs/models.md").read_text().splitlines()
    assert ", ".join(f"`{family}`" for family in sorted(TESTED_FAMILIES)) in lines
