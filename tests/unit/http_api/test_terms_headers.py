"""Priority and salt of a request by its head, in every dialect."""

from __future__ import annotations

from typing import Any

import pytest
from tests.helpers.adapter_world import adapter_world
from tests.helpers.dialects import CHAT, COMPLETIONS, DIALECTS, LORAX, Dialect, fault_of
from tests.helpers.http_app import TEMPLATE
from tests.helpers.in_loop import in_loop

from lorax_router.core.request import RequestTerms
from lorax_router.service.engine.loop import EngineLoop

HEAD = {"x-priority": " -3", "x-cache-salt": "mine"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RequestTerms]:
    """On what terms requests came to the engine."""
    terms: list[RequestTerms] = []
    submit = EngineLoop.submit

    def noting(self: EngineLoop, spec: Any, given: RequestTerms) -> Any:
        terms.append(given)
        return submit(self, spec, given)

    monkeypatch.setattr(EngineLoop, "submit", noting)
    return terms


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda each: each.name)
def test_the_head_says_on_what_terms_a_request_comes(
    dialect: Dialect, stream: bool, asked: list[RequestTerms]
) -> None:
    """Anthropic's clients and LoRAX's have no fields for it."""

    @in_loop
    async def scene() -> None:
        async with adapter_world(template=TEMPLATE) as world:
            path, body = dialect.asked({}, stream=stream)
            assert (await world.client.post(path, json=body, headers=HEAD)).status_code == 200
            assert (await world.client.post(path, json=body)).status_code == 200

    scene()
    assert [(each.priority, each.cache_salt) for each in asked] == [(-3, "mine"), (0, "")]


@pytest.mark.parametrize("dialect", [COMPLETIONS, CHAT], ids=lambda each: each.name)
def test_what_the_body_says_counts_before_the_head(
    dialect: Dialect, asked: list[RequestTerms]
) -> None:
    """A gateway's header is for those who say nothing."""

    @in_loop
    async def scene() -> None:
        async with adapter_world(template=TEMPLATE) as world:
            path, body = dialect.asked({"priority": 2, "cache_salt": "own"}, stream=False)
            assert (await world.client.post(path, json=body, headers=HEAD)).status_code == 200

    scene()
    assert [(each.priority, each.cache_salt) for each in asked] == [(2, "own")]


@pytest.mark.parametrize("text", ["", "high", "1.5", "9" * 5000, "--1", "½", "1" * 30])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda each: each.name)
def test_a_priority_that_is_no_number_is_refused_by_the_headers_name(
    dialect: Dialect, text: str
) -> None:
    @in_loop
    async def scene() -> None:
        async with adapter_world(template=TEMPLATE) as world:
            path, body = dialect.asked({}, stream=False)
            head = [("x-priority", text.encode())]
            answer = await world.client.post(path, json=body, headers=head)  # type: ignore[arg-type]
            assert answer.status_code == 400
            assert "x-priority must be a whole number" in fault_of(path, answer).text

    scene()


def test_lorax_s_headers_tell_what_was_in_the_cache() -> None:
    """The second time all but the last block of the prompt."""

    @in_loop
    async def scene() -> None:
        async with adapter_world() as world:
            body = {**LORAX.body, "inputs": " ".join(f"w{number}" for number in range(40))}
            heads = [(await world.client.post("/generate", json=body)).headers for _ in range(2)]
            assert heads[0]["x-cached-tokens"] == "0"
            assert 0 < int(heads[1]["x-cached-tokens"]) < int(heads[1]["x-prompt-tokens"])

    scene()
