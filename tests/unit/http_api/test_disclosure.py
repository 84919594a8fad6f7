"""What the server tells of itself: no secret, nothing of its inside, and no door for its makers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.adapter_world import adapter_world
from tests.helpers.in_loop import in_loop
from tests.helpers.tenants import ADMIN_KEY, METRICS_KEY, key_of, tenant_world

from lorax_contract.keys import hash_of

TOLD = (
    "/", "/health", "/info", "/metrics", "/docs", "/openapi.json", "/v1/models", "/v1/adapters",
    "/nowhere",
)  # fmt: skip
# What servers of the field have for those who make them, and what frameworks bring along.
DOORS = (
    "/debug", "/debug/pprof", "/debug/vars", "/_debug", "/console", "/env", "/config", "/dump",
    "/start_profile", "/stop_profile", "/profile", "/server_info", "/get_server_info",
    "/collective_rpc", "/reset_prefix_cache", "/flush_cache", "/sleep", "/wake_up",
    "/update_weights_from_disk", "/set_internal_state", "/actuator", "/threads", "/stack",
    "/static/../pyproject.toml", "/docs/../../pyproject.toml", "/docs/%2e%2e/pyproject.toml",
    "/.env", "/redoc",
)  # fmt: skip


@in_loop
async def test_no_answer_shows_a_key_a_hash_a_token_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    monkeypatch.setenv("ANT_TOKEN", "hf_of_the_tenant")
    tenants = {"ant": {"api_token_env": "ANT_TOKEN"}}
    async with tenant_world(tmp_path, tenants) as (_, callers):
        assert (await callers["ant"].use("org/poet")).status_code == 200
        secrets = [ADMIN_KEY, METRICS_KEY, key_of("ant")]
        secrets += [*map(hash_of, secrets), "hf_of_the", str(tmp_path)]
        for name in ("admin", "ant"):
            told = [await callers[name].get(path) for path in TOLD]
            shown = "".join(f"{each.headers} {each.text}" for each in told)
            assert [secret for secret in secrets if secret in shown] == []
            assert "org/poet" in shown


@pytest.mark.parametrize("path", DOORS)
def test_there_is_no_door_for_its_makers(path: str) -> None:
    @in_loop
    async def scene() -> None:
        async with adapter_world() as world:
            for client in (world.client, world.admin):
                for ask in (client.get, client.post):
                    answer = await ask(path)
                    assert answer.status_code in (404, 405), answer.text
                    assert "Traceback" not in answer.text

    scene()
