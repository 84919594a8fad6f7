"""Scenes before a server without keys: ``python -m tests.acceptance.look.open_scenes < SETTING``."""

from __future__ import annotations

import json

from playwright.sync_api import Page
from tests.acceptance.clients.checks import check, same
from tests.acceptance.look.browser import (
    PHONE,
    Look,
    add,
    answer_of,
    fact,
    looking,
    panel,
    send,
    wait_for_rows,
    wait_until_done,
)
from tests.acceptance.look.traffic import traffic

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTERS = ("local:pirate", "local:sentiment", "local:json-only")
QUESTION = "Which fruits grow in warm countries, and how are they eaten?"
# Of how many panels the tokens are counted while they come.
NUM_STREAMING = """document.querySelectorAll('.panel .state.busy').length > 1 &&
    [...document.querySelectorAll('.panel .state.busy')].filter(e => /token/.test(e.textContent)
        && !/waiting/.test(e.textContent)).length > 1"""


def side_by_side(look: Look, page: Page) -> None:
    """The base and three adapters stream at once, and each token can be looked at."""
    page.get_by_label(BASE, exact=True).wait_for()
    check("the base is chosen at first", page.get_by_label(BASE, exact=True).is_checked())
    add(page, *ADAPTERS)
    page.locator("#seed").fill("7")
    page.locator("#max-tokens").fill("64")
    send(page, QUESTION)
    seen = wait_for(page, NUM_STREAMING)
    check("several answers stream side by side", seen)
    wait_until_done(page)
    answers = {model: answer_of(page, model) for model in (BASE, *ADAPTERS)}
    check("each has answered", all(answers.values()), answers)
    check("each in its own way", len(set(answers.values())) == 4, answers)
    check("json-only answers in JSON", answers["local:json-only"].startswith("{"), answers)
    for model in (BASE, *ADAPTERS):
        same(f"{model} is done", panel(page, model).locator(".state").inner_text(), "done")
        check(f"{model}: time to the first token", " s" in fact(page, model, "First token"))
        check(f"{model}: tokens of the prompt", "tokens" in fact(page, model, "Prompt"))
    check("tokens a second", "tokens/s" in fact(page, BASE, "Speed"))
    tokens = panel(page, BASE).locator(".token")
    tokens.nth(3).hover()
    looked = panel(page, BASE).locator(".looked")
    check("a pointer shows a token's probability", "%" in looked.locator(".taken").inner_text())
    check("and what else could have come", looked.locator(".other").count() >= 4)
    same("the page keeps its text", "".join(tokens.all_text_contents()), answers[BASE])
    look.is_accessible(page, "compare")
    look.picture(page, "compare")


def conversation(page: Page) -> None:
    """A second turn knows the first one, which comes from the cache; a new one knows nothing."""
    send(page, "Say that in three words.")
    wait_until_done(page)
    same("two turns are there", panel(page, BASE).locator(".asked").count(), 2)
    cached = fact(page, BASE, "From the cache")
    check("the first turn came from the cache", int(cached.split()[0]) > 0, cached)
    page.get_by_role("button", name="New conversation").click()
    same("it begins anew", panel(page, BASE).locator(".asked").count(), 0)
    page.get_by_label("Plain prompt").check()
    send(page, "The capital of France is")
    wait_until_done(page)
    check("a plain prompt is gone on with", answer_of(page, BASE))
    page.get_by_label("Chat", exact=True).check()


def schemas(page: Page) -> None:
    """Answers are bound to a schema; one that is no JSON, or that the server refuses, is said."""
    page.locator("#binding summary").click()
    page.get_by_label("Bind answers to this schema").check()
    send(page, "Is the sky blue?")
    wait_until_done(page)
    for model in (BASE, *ADAPTERS):
        found = json.loads(answer_of(page, model))
        check(f"{model} keeps to the schema", set(found) == {"answer", "certain"}, found)
    schema = page.locator("#schema")
    schema.fill('{"type": ')
    send(page, "Is the sky blue?")
    check("no JSON is said", "no JSON" in page.locator("#schema-fault").inner_text())
    schema.fill('{"type": "nothing"}')
    send(page, "Is the sky blue?")
    wait_until_done(page)
    words = panel(page, BASE).get_by_role("alert").last.inner_text()
    check("what the server refuses is said in its words", "nothing" in words, words)
    page.get_by_label("Bind answers to this schema").uncheck()


def errors(look: Look, page: Page) -> None:
    """What fails on one side says why, and the others go on; an answer can be stopped."""
    add(page, "local:nobody")
    page.locator("#max-tokens").fill("8")
    send(page, "Hello")
    wait_until_done(page)
    words = panel(page, "local:nobody").get_by_role("alert").inner_text()
    check("an unknown adapter is said", "there is no model 'local:nobody'" in words, words)
    same("others answered", panel(page, BASE).locator(".state").inner_text(), "done")
    look.is_accessible(page, "compare with an error")
    page.locator("#max-tokens").fill("700")
    page.get_by_label("Plain prompt").check()
    send(page, "1 2 3 4 5 6 7 8 9 10 11 12 13 14")
    wait_for(page, NUM_STREAMING)
    page.get_by_role("button", name="Stop").click()
    wait_until_done(page)
    stopped = [each.inner_text() for each in page.locator(".panel .state").all()]
    check("answers can be stopped", "stopped" in stopped, stopped)


def adapters(look: Look, page: Page) -> None:
    """The list has states and reasons; without keys the page says where adapters are managed."""
    page.get_by_role("tab", name="Adapters").click()
    pirate = page.locator(".adapter").filter(has_text="local:pirate")
    pirate.get_by_text("resident", exact=True).wait_for()
    nobody = page.locator(".adapter").filter(has_text="local:nobody")
    check("a refused one says why", nobody.locator(".fault").inner_text())
    check("managing is elsewhere", page.locator("#no-managing").inner_text())
    same("nothing is offered", page.get_by_role("button", name="Unload local:pirate").count(), 0)
    look.is_accessible(page, "adapters")


def engine(look: Look, page: Page) -> None:
    """What runs is shown by adapter, with steps and blocks."""
    asked = [*(("pirate", "") for _ in range(5)), *(("json-only", "") for _ in range(4))]
    asked += [*(("sentiment", "") for _ in range(2)), *((BASE, "") for _ in range(6))]
    page.get_by_role("tab", name="Engine").click()
    with traffic(look.url, asked):
        wait_for_rows(page, "local:pirate", 5)
        # Long enough for the line to be one.
        page.wait_for_timeout(15_000)
        wait_for_rows(page, "base", 6)
        figures = {
            each: page.locator(f".is-{each} .figure").inner_text()
            for each in ("batch", "speed", "blocks", "slots")
        }
        same("rows of the batch", figures["batch"], "17 rows")
        check("steps a second", float(figures["speed"]) > 0, figures)
        check("KV blocks in use", int(figures["blocks"]) > 0, figures)
        check("adapters in their slots", int(figures["slots"]) >= 3, figures)
        same("a square for each row", page.locator(".squares rect:not(.fill-free)").count(), 17)
        sentences = page.locator(".number > .quiet").all_inner_texts()
        check("a sentence for each number", len(sentences) == 6 and all(sentences), sentences)
        look.is_accessible(page, "engine")
        look.picture(page, "engine")


def phone(look: Look) -> None:
    """At 360 pixels, in the dark: nothing is cut off, and it is as accessible."""
    with look.page(PHONE, "dark") as page:
        page.get_by_label(BASE, exact=True).wait_for()
        page.get_by_label("local:pirate", exact=True).check()
        page.locator("#sampling summary").click()
        page.locator("#max-tokens").fill("40")
        page.locator("#sampling summary").click()
        send(page, "What is the capital of France?")
        wait_until_done(page)
        panel(page, "local:pirate").locator(".token").nth(2).click()
        look.fits(page, "compare on a phone")
        look.is_accessible(page, "compare on a phone, dark")
        panel(page, "local:pirate").scroll_into_view_if_needed()
        look.picture(page, "phone", whole=False)
        for view in ("Adapters", "Engine"):
            page.get_by_role("tab", name=view).click()
            page.locator(".adapter" if view == "Adapters" else ".number").first.wait_for()
            look.fits(page, f"{view} on a phone")
            look.is_accessible(page, f"{view} on a phone, dark")


def keyboard(look: Look) -> None:
    """All of it by keys alone, and the focus is always seen."""
    with look.page() as page:
        page.get_by_label(BASE, exact=True).wait_for()
        keys = page.keyboard
        tab_to(page, "#tab-compare")
        keys.press("ArrowRight")
        check("arrows change views", page.locator("#adapters").is_visible())
        keys.press("End")
        check("End goes to the last", page.locator("#engine").is_visible())
        keys.press("Home")
        tab_to(page, "#choices label:nth-of-type(2) input")
        keys.press("Space")
        tab_to(page, "#max-tokens")
        keys.press("Control+A")
        keys.type("24")
        tab_to(page, "#prompt")
        keys.press("Control+A")
        keys.type("Name two colours.")
        keys.press("Control+Enter")
        page.locator(".panel").nth(1).locator(".answer").wait_for()
        page.locator("#send:enabled").wait_for()
        same("two have answered", page.locator(".panel .state.done").count(), 2)
        tab_to(page, ".panel .answer")
        keys.press("ArrowRight")
        check("arrows walk over tokens", "%" in page.locator(".looked .taken").first.inner_text())
        same("the second one", page.locator(".token.is-at").first.evaluate("e => e.place"), 1)


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until an element has the focus, and see that the focus shows."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            check(f"the focus shows on {selector}", style == "solid", style)
            return
    check(f"Tab reaches {selector}", False)


def wait_for(page: Page, condition: str) -> bool:
    """Whether a condition comes true in time; asked from outside, as the policy allows no text to run."""
    for _ in range(6000):
        if page.evaluate(condition):
            return True
        page.wait_for_timeout(30)
    return False


def main() -> None:
    """Run all scenes."""
    with looking() as look:
        with look.page() as page:
            side_by_side(look, page)
            conversation(page)
            schemas(page)
            errors(look, page)
            adapters(look, page)
            engine(look, page)
        phone(look)
        keyboard(look)
        look.asked_nobody_else()


if __name__ == "__main__":
    main()
