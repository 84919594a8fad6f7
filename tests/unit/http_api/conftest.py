"""What generates is asked twice: in the process of the service, and through a front."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from tests.helpers.fronts import FrontPair, front_of
from tests.helpers.http_app import World

TWICE = {
    "test_generate", "test_chats", "test_completions", "test_responses", "test_messages",
    "test_embed", "test_embeddings", "test_classify", "test_rank",
}  # fmt: skip
GENERATING = (
    "/", "/invocations", "/generate", "/generate_stream", "/v1/completions",
    "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/embeddings", "/embed", "/classify", "/classify_batch", "/predict", "/rerank",
    "/v1/rerank", "/v2/rerank", "/score", "/v1/score", "/similarity", "/embed_all",
    "/embed_sparse", "/embeddings",
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in TWICE:
        metafunc.parametrize("asked_through", ["core", "front"], indirect=True)


@pytest.fixture(autouse=True)
def asked_through(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Have the clients of worlds call a front, where that is what a test is about."""
    if getattr(request, "param", "core") != "front":
        yield
        return
    pairs: dict[int, FrontPair] = {}
    # Kept, so that no other one has its id.
    worlds: list[World] = []

    def client(world: World) -> httpx.AsyncClient:
        if id(world) not in pairs:
            worlds.append(world)
            pairs[id(world)] = front_of(world)
        return pairs[id(world)].client()

    monkeypatch.setattr(World, "client", client)
    yield
    # What the front can do itself it did not leave to the core.
    assert not any(each.num_forwarded(GENERATING) for each in pairs.values())
