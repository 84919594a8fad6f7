"""The playground without a browser: its files, their headers, keys, and the document that it polls."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_world import adapter_world, fetched
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop
from tests.helpers.tenants import METRICS_KEY, bearer, key_of, tenant_world

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_router.http_api.playground import routes

FOLDER = Path(routes.__file__).parent
FILES = sorted(each for each in FOLDER.iterdir() if each.suffix in (".html", ".css", ".js", ".svg"))
PATHS = ["/playground", *(f"/playground/{each.name}" for each in FILES if each.suffix != ".html")]


class Markup(HTMLParser):
    """Notes what a page links to and what it has in its markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


# --- the files --------------------------------------------------------------------


@in_loop
async def test_it_is_off_unless_it_is_wanted() -> None:
    async with adapter_world() as world:
        for path in (*PATHS, "/playground/", "/playground/live"):
            assert (await world.client.get(path)).status_code == 404
            assert (await world.admin.get(path)).status_code == 404


@in_loop
async def test_every_file_is_served_with_a_strict_policy() -> None:
    async with adapter_world(playground=True) as world:
        assert len(PATHS) == len(FILES) > 8
        for path in (*PATHS, "/playground/live"):
            answer = await world.client.get(path)
            assert answer.status_code == 200
            allowed = dict(
                each.split(" ", 1) for each in answer.headers["content-security-policy"].split("; ")
            )
            own = {"script-src", "style-src", "img-src", "connect-src"}
            assert {allowed.pop(each) for each in own} == {"'self'"}
            assert allowed.pop("require-trusted-types-for") == "'script'"
            assert allowed == dict.fromkeys(
                ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"),
                "'none'",
            )
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["x-frame-options"] == "DENY"
            assert (await world.client.head(path)).status_code == 200
        kinds = {
            path.rpartition(".")[2]: (await world.client.get(path)).headers["content-type"]
            for path in PATHS
        }
        assert kinds["js"].startswith("text/javascript")
        assert kinds["css"].startswith("text/css")
        assert kinds["svg"] == "image/svg+xml"
        page = await world.client.get("/playground/")
        assert (page.status_code, page.headers["location"]) == (308, "../playground")
        # It is for clients: the operator's listener lets no page in.
        assert (await world.admin.get("/playground")).status_code == 404


@in_loop
async def test_all_that_the_page_names_is_there_and_nothing_of_it_is_in_line() -> None:
    async with adapter_world(playground=True) as world:
        page = Markup((await world.client.get("/playground")).text)
        named = [attrs.get("href") or attrs.get("src") for _, attrs in page.tags]
        links = {each for each in named if each and not each.startswith("#")}
        assert len(links) > 6
        for link in links:
            assert (await world.client.get(f"/{link}")).status_code == 200
    for tag, attrs in page.tags:
        assert tag != "style"
        assert tag != "script" or attrs.get("src")
        assert not [name for name in attrs if name == "style" or name.startswith("on")]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_short_and_name_no_other_host_storage_or_markup_of_texts(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 300
    hosts = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text))
    assert hosts <= {"http://www.w3.org"}
    for word in (
        "localStorage",
        "sessionStorage",
        "document.cookie",
        "innerHTML",
        "indexedDB",
        "eval(",
    ):
        assert word not in text
    for imported in re.findall(r"from '\./([\w.]+)'", text):
        assert (FOLDER / imported).is_file()


def test_ids_that_the_scripts_ask_for_are_in_the_page() -> None:
    page = (FOLDER / "index.html").read_text()
    ids = set(re.findall(r'id="([\w-]+)"', page))
    asked = {
        name
        for path in FOLDER.glob("*.js")
        for name in re.findall(r"byId\('([\w-]+)'\)", path.read_text())
    }
    assert len(asked) > 20
    assert asked <= ids


# --- keys -------------------------------------------------------------------------


@in_loop
async def test_with_keys_the_files_are_open_and_all_that_they_ask_for_is_not(
    tmp_path: Path,
) -> None:
    async with tenant_world(tmp_path, {"ant": {}}, playground=True) as (world, callers):
        for path in PATHS:
            assert (await world.client.get(path)).status_code == 200
            # To be read, and nothing else.
            assert (await world.client.post(path)).status_code == 401
        for path in ("/playground/live", "/playground/nothing", "/v1/models", "/v1/adapters"):
            refused = await world.client.get(path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert (await callers["ant"].get("/playground/live")).status_code == 200
        scraper = await world.client.get("/playground/live", headers=bearer(METRICS_KEY))
        assert scraper.status_code == 403
        in_url = await world.client.get(f"/playground/live?key={key_of('ant')}")
        assert in_url.status_code == 401


@in_loop
async def test_the_page_is_told_what_a_key_may_do(tmp_path: Path) -> None:
    tenants = {"ant": {}, "bee": {"pins": 1}}
    async with tenant_world(tmp_path, tenants, playground=True) as (_, callers):
        for name, rights in (
            ("ant", (False, False)),
            ("bee", (False, True)),
            ("admin", (True, True)),
        ):
            told = (await callers[name].get("/playground/live")).json()["caller"]
            assert (told["may_manage"], told["may_pin"]) == rights
            assert told["has_key"] is True
    async with adapter_world(playground=True) as world:
        told = (await world.client.get("/playground/live")).json()["caller"]
        assert told == {"has_key": False, "tenant": None, "may_manage": False, "may_pin": False}
        # And the server sees to it.
        body = {"adapter_id": "poet", "adapter_source": "local"}
        assert (await world.client.post("/v1/adapters/load", json=body)).status_code == 403


# --- what is live -----------------------------------------------------------------


@in_loop
async def test_the_document_of_a_server_without_keys_tells_of_all() -> None:
    async with adapter_world(playground=True) as world:
        idle = (await world.client.get("/playground/live")).json()
        assert idle["model"] == "fake"
        assert (idle["groups"], idle["rows"]["running"], idle["steps"]) == ([], 0, 0)
        world.shard.step_delay_s = 0.02
        tasks = [world.task("poet", 40), world.task("poet", 40), world.task(None, 40)]
        await until(lambda: world.parts.engine.stats().num_running == 3)
        live = (await world.client.get("/playground/live")).json()
        assert {(each["adapter"], each["running"]) for each in live["groups"]} == {
            ("local:poet", 2), ("fake", 1),
        }  # fmt: skip
        assert [each["is_base"] for each in live["groups"]] == [False, True]
        assert live["rows"]["running"] == 3
        assert sum(each["blocks"] for each in live["groups"]) >= 3
        assert live["kv"]["used"] > 0
        assert live["kv"]["blocks"] == 400
        assert live["adapters"]["states"] == {"resident": 1}
        (poet,) = live["adapters"]["in_play"]
        assert (poet["adapter"], poet["state"], poet["pinned"]) == ("local:poet", "resident", False)
        await asyncio.gather(*tasks)
        done = (await world.client.get("/playground/live")).json()
        assert done["steps"] > live["steps"]
        assert done["seconds"] > live["seconds"]
        assert done["generated_tokens"] == 120
        assert done["prompt_tokens"] == 9


async def seen_while_two_tenants_run(world: Any, callers: Any) -> dict[str, Any]:
    """What each caller sees while ant has one row and bee two, with an adapter each."""
    world.shard.step_delay_s = 0.02
    asked = [callers[name].use(name, "local", max_new_tokens=60) for name in ("ant", "bee", "bee")]
    tasks = [asyncio.create_task(each) for each in asked]
    await until(lambda: world.parts.engine.stats().num_running == 3)
    seen = {
        name: (await callers[name].get("/playground/live")).json()
        for name in ("ant", "bee", "admin")
    }
    assert [(await task).status_code for task in tasks] == [200] * 3
    return seen


@in_loop
async def test_an_admin_sees_all_tenants_and_a_tenant_itself_and_the_sums(tmp_path: Path) -> None:
    tenants = {"ant": {"adapters": ["ant"]}, "bee": {"adapters": ["bee"]}}
    async with tenant_world(tmp_path, tenants, playground=True) as (world, callers):
        seen = await seen_while_two_tenants_run(world, callers)
    rows = {
        name: [
            (each["adapter"], each["tenant"], each["is_others"], each["running"])
            for each in live["groups"]
        ]
        for name, live in seen.items()
    }
    assert rows["admin"] == [("local:bee", "bee", False, 2), ("local:ant", "ant", False, 1)]
    assert rows["ant"] == [("local:ant", "ant", False, 1), (None, None, True, 2)]
    assert rows["bee"] == [("local:bee", "bee", False, 2), (None, None, True, 1)]
    for name, other in (("ant", "bee"), ("bee", "ant")):
        assert seen[name]["rows"]["running"] == 3
        # What is out of a tenant's bounds has no name for it.
        assert {each["adapter"] for each in seen[name]["adapters"]["in_play"]} == {
            f"local:{name}",
            None,
        }
        assert f'"{other}"' not in str(seen[name]).replace("'", '"')
        assert f"local:{other}" not in str(seen[name])


@in_loop
async def test_a_private_adapter_has_no_name_for_anybody() -> None:
    async with adapter_world(playground=True) as world:
        world.sources.contents["secret"] = fetched("secret", access="token")
        world.shard.step_delay_s = 0.02
        task = world.task("secret", 40, token="hf_of_the_owner")
        await until(lambda: world.parts.engine.stats().num_running == 1)
        # Others ask for it in vain, and the server remembers that they did.
        world.sources.contents["secret"] = AdapterUnavailableError(Reason.NO_ACCESS, "not for you")
        with pytest.raises(AdapterUnavailableError):
            await world.generate("secret", token=None)
        live = await world.client.get("/playground/live")
        await task
    assert "secret" not in live.text
    assert [each["adapter"] for each in live.json()["groups"]] == [None]
    assert [each["adapter"] for each in live.json()["adapters"]["in_play"]] == [None]


@in_loop
async def test_a_server_of_the_base_alone_has_no_adapters_to_show() -> None:
    async with adapter_world(playground=True, adapter_refusal="none are served") as world:
        assert (await world.client.get("/playground/live")).json()["adapters"] is None
