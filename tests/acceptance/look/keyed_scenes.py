"""Scenes before a server with keys and fronts: ``python -m tests.acceptance.look.keyed_scenes < SETTING``."""

from __future__ import annotations

from contextlib import AbstractContextManager

from playwright.sync_api import Page
from tests.acceptance.clients.checks import check, same
from tests.acceptance.look.browser import (
    Look,
    add,
    answer_of,
    looking,
    send,
    wait_for_rows,
    wait_until_done,
)
from tests.acceptance.look.traffic import traffic


def use_key(page: Page, key: str) -> None:
    """Type a key and use it."""
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use", exact=True).click()


def keys(look: Look, page: Page) -> None:
    """The page asks for a key, says what is wrong with one, and uses one that is right."""
    field = page.get_by_label("Key", exact=True)
    field.wait_for()
    check("the key has the focus", field.evaluate("e => e === document.activeElement"))
    same("it is hidden as it is typed", field.get_attribute("type"), "password")
    look.is_accessible(page, "asked for a key")
    use_key(page, "sk-of-nobody")
    page.locator("#key[aria-invalid]").wait_for()
    words = page.locator("#trouble").inner_text()
    check("a wrong key is said in the server's words", "key" in words, words)
    use_key(page, look.setting["tenant_keys"]["ant"])
    page.get_by_text("ant", exact=True).wait_for()
    check("the trouble is over", page.locator("#trouble").is_hidden())
    alias = page.get_by_label("sentiment", exact=True)
    alias.wait_for()
    same("a name of the operator's is there once, as it is", alias.count(), 1)
    add(page, "local:pirate")
    page.locator("#max-tokens").fill("24")
    send(page, "Who are you?")
    wait_until_done(page)
    check("it answers with a key", answer_of(page, "local:pirate"))


def tenant(look: Look, page: Page) -> None:
    """A tenant may look at adapters, and sees its own rows beside the sum of the others'."""
    page.get_by_role("tab", name="Adapters").click()
    page.locator(".adapter").first.wait_for()
    check("it may not load", page.locator("#loading").is_hidden())
    same("nor unload", page.get_by_role("button", name="Unload").count(), 0)
    page.get_by_role("tab", name="Engine").click()
    with running(look):
        wait_for_rows(page, "others’ requests", 3)
        wait_for_rows(page, "local:pirate", 2)
        check("others have no names", "bee" not in page.locator("#engine").inner_text())


def admin(look: Look, page: Page) -> None:
    """An admin loads, pins and unloads, and sees whose rows are whose."""
    use_key(page, look.setting["admin_key"])
    page.get_by_text("(may manage)").wait_for()
    with running(look):
        wait_for_rows(page, "bee", 3)
        wait_for_rows(page, "ant", 2)
        check("an admin sees all tenants", page.get_by_text("others’ requests").count() == 0)
    page.get_by_role("tab", name="Adapters").click()
    page.locator("#load-id").fill("sentiment")
    page.locator("#load-source").select_option("local")
    page.get_by_label("and keep it").check()
    page.get_by_role("button", name="Load", exact=True).click()
    heading = page.get_by_role("heading", name="local:sentiment", exact=True)
    sentiment = page.locator(".adapter").filter(has=heading)
    sentiment.get_by_text("pinned", exact=True).wait_for()
    check("it is loaded", "is loaded" in page.locator("#managed").inner_text())
    sentiment.get_by_text("resident", exact=True).wait_for()
    page.locator("#load-id").fill("nobody")
    page.get_by_role("button", name="Load", exact=True).click()
    fault = page.locator("#managed-fault")
    fault.wait_for()
    check("what cannot be loaded is said", "nobody" in fault.inner_text(), fault.inner_text())
    look.is_accessible(page, "managing adapters")
    look.picture(page, "adapters")
    sentiment.get_by_role("button", name="Unpin local:sentiment").click()
    page.get_by_role("button", name="Pin local:sentiment", exact=True).wait_for()
    page.get_by_role("button", name="Unload local:sentiment").click()
    page.get_by_text("local:sentiment is unloaded.").wait_for()
    sentiment.wait_for(state="detached")
    check("pinned, unpinned, unloaded", True)


def running(look: Look) -> AbstractContextManager[None]:
    """Two streams of one tenant and three of another."""
    ant, bee = (look.setting["tenant_keys"][name] for name in ("ant", "bee"))
    return traffic(look.url, [*[("pirate", ant)] * 2, *[("json-only", bee)] * 3])


def secrets(look: Look, page: Page) -> None:
    """Keys are in no URL and in no storage, and gone with the page."""
    known = [look.setting["admin_key"], *look.setting["tenant_keys"].values()]
    check(
        "no key is in a URL", not [each for each in look.asked if any(key in each for key in known)]
    )
    kept = page.evaluate(
        "JSON.stringify([localStorage, sessionStorage, document.cookie, history.state])"
    )
    check("nothing is kept", kept == '[{},{},"",null]', kept)
    page.reload()
    page.locator("#trouble").wait_for()
    same("the key is gone", page.get_by_label("Key", exact=True).input_value(), "")


def main() -> None:
    """Run all scenes."""
    with looking() as look:
        with look.page() as page:
            keys(look, page)
            tenant(look, page)
            admin(look, page)
            secrets(look, page)
        look.asked_nobody_else()


if __name__ == "__main__":
    main()
