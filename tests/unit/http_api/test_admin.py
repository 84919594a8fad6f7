"""Who may manage adapters: this machine's users, and no page or proxy."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.responses import JSONResponse

from lorax_router.http_api.admin import AdminGuard
from lorax_router.http_api.listeners import bind_unix
from lorax_router.http_api.server import HttpServer


def call(*, on_unix: bool = False, host: str | None = "localhost", **headers: str) -> int:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if host is not None:
        sent["host"] = host

    async def run() -> httpx.Response:
        guard = AdminGuard(JSONResponse({}), on_unix=on_unix)
        transport = httpx.ASGITransport(app=guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/", headers=sent, json={})

    response = asyncio.run(run())
    if response.status_code == 403:
        assert response.json()["error_type"] == "forbidden"
    return response.status_code


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:3001", "127.0.0.1:3001", "127.9.9.9", "[::1]:3001", "LOCALHOST"],
)
def test_this_machine_may(host: str) -> None:
    assert call(host=host) == 200


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:3001", "localhost.evil.example", "127.0.0.1.nip.io",
     "10.0.0.7", "0.0.0.0", "[::]", "localhost@evil.example", "[", "2130706433"],
)  # fmt: skip
def test_a_host_that_another_name_server_says_is_this_machine_may_not(host: str) -> None:
    assert call(host=host) == 403


@pytest.mark.parametrize("on_unix", [False, True])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://page.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3001"},
        {"forwarded": "for=10.0.0.7"},
        {"x_forwarded_for": "10.0.0.7"},
        {"x_forwarded_host": "localhost"},
        {"x_real_ip": "10.0.0.7"},
        {"via": "1.1 proxy"},
    ],
)
def test_pages_and_proxies_may_not(on_unix: bool, headers: dict[str, str]) -> None:
    assert call(on_unix=on_unix, **headers) == 403


def test_on_a_unix_socket_hosts_have_any_name() -> None:
    assert call(on_unix=True, host="whatever") == 200


def test_a_unix_socket_is_served_is_private_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "admin"

    async def run() -> None:
        with bind_unix(str(path)) as listener:
            assert path.stat().st_mode & 0o077 == 0
            listener.listen()
            with pytest.raises(OSError, match="somebody listens"), bind_unix(str(path)):
                pass
            server = HttpServer(AdminGuard(JSONResponse({"is": "here"}), on_unix=True), listener)
            running = asyncio.create_task(server.run())
            await server.wait_started()
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(transport=transport) as client:
                assert (await client.get("http://localhost/")).json() == {"is": "here"}
            server.stop()
            await running
        assert not path.exists()

    asyncio.run(run())


def test_a_socket_that_a_dead_server_left_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "admin")
    with bind_unix(path):
        Path(path).rename(tmp_path / "left")
    with bind_unix(str(tmp_path / "left")):
        assert (tmp_path / "left").is_socket()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="no socket"), bind_unix(str(tmp_path / "file")):
        pass
    assert (tmp_path / "file").read_text() == "kept"
