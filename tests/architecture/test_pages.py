"""What README and docs name is there, and their commands are ones that ``make acceptance NAME=look`` can run."""

from __future__ import annotations

import asyncio
import re
from functools import cache
from pathlib import Path

import pytest
from tests.helpers import documented_names
from tests.helpers.adapter_world import adapter_world
from tests.helpers.documented_blocks import ROOT, blocks, faults, pages

from lorax_router.http_api.playground.routes import LIVE_PATH, PAGE_PATH

PAGES = [
    *pages(),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "bench").rglob("*.md")),
]
# Of LoRAX, TGI and vLLM, and not here: pages say so.
ABSENT = {"/chat_tokenize", "/version", "/pooling"}
# What is typed into `lorax-cli chat`, a folder, and what clients take as their base.
NO_ROUTES = {"/adapter", "/adapters", "/again", "/quit", "/reset", "/system", "/folder", "/v1"}
# Not in the document that lists the others.
UNLISTED = {
    "/docs", "/api-doc/openapi.json", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", PAGE_PATH,
    LIVE_PATH,
}  # fmt: skip


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_block_of_commands_can_be_run_or_says_why_not(page: Path) -> None:
    found = {block.place: faults(block) for block in blocks(page)}
    assert not {place: told for place, told in found.items() if told}


def test_there_are_blocks_of_commands() -> None:
    assert sum(len(blocks(page)) for page in pages()) > 40


@cache
def known_flags() -> set[str]:
    return documented_names.known_flags()


@every_page
def test_every_flag_is_one_of_a_program(page: Path) -> None:
    assert documented_names.flags(page.read_text(), page) <= known_flags()


@cache
def known_routes() -> frozenset[str]:
    async def ask() -> set[str]:
        async with adapter_world(playground=True) as world:
            documents = [
                (await client.get("/api-doc/openapi.json")).json()
                for client in (world.client, world.admin)
            ]
        return {path for document in documents for path in document["paths"]}

    return frozenset(asyncio.run(ask()) | UNLISTED)


@every_page
def test_every_route_is_one_of_the_server(page: Path) -> None:
    named = documented_names.routes(page.read_text()) - ABSENT - NO_ROUTES
    assert {each for each in named if not _is_known(each)} == set()


def _is_known(route: str) -> bool:
    # `/pin` stands behind `/v1/adapters/load`, and `/v1/adapters/...` for all of them.
    if route.endswith("..."):
        return any(each.startswith(route[:-3]) for each in known_routes())
    return any(_without_names(each).endswith(_without_names(route)) for each in known_routes())


def _without_names(route: str) -> str:
    return re.sub(r"\{.*?\}", "{}", route)


@every_page
def test_every_metric_is_one_of_the_server(page: Path) -> None:
    table = (ROOT / "docs/metrics.md").read_text()
    told = set(re.findall(r"^\| `([a-z_:]+)`", table, re.MULTILINE))
    assert documented_names.metrics(page.read_text()) <= told


@every_page
def test_every_make_target_is_there(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert documented_names.make_targets(page.read_text(), page) <= targets


@every_page
def test_every_link_leads_to_a_page_and_a_place_in_it(page: Path) -> None:
    for link in documented_names.links(page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in documented_names.anchors(target), link
