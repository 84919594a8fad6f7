"""How many clients there may be, with the files that the system grants."""

from __future__ import annotations

import resource

import pytest

from lorax_contract.config import RouterConfig
from lorax_router.listening import granted_connections


@pytest.mark.parametrize(
    ("files", "grpc_port", "expected"),
    [
        (resource.RLIM_INFINITY, None, 4096),
        (100_000, None, 4096),
        (100_000, 3002, 4096),
        (1_128, None, 1_000),
        # Those of gRPC are files of the same process.
        (1_128, 3002, 500),
        (10, 3002, 1),
    ],
)
def test_all_listeners_together_need_no_more_files_than_there_are(
    monkeypatch: pytest.MonkeyPatch, files: int, grpc_port: int | None, expected: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (256, files))
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, limits: raised.append(limits))
    config = RouterConfig(model_id="m", tokenizer_dir="", shard_uri="", grpc_port=grpc_port)
    assert granted_connections(config) == expected
    assert raised == [(files, files)]
