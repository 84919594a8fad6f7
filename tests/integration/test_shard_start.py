"""What a shard does between loading and the first call."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

from tests.helpers.toy_paged_model import make_engine

from lorax_contract.config import ShardConfig
from lorax_contract.exit_codes import ExitCode
from lorax_shard import app
from lorax_shard.app import ShardParts, Stopper


class StoppedWhenReady(Stopper):
    """Stops the shard as soon as it serves."""

    def attach(self, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
        loop.call_soon(stop.set)


def test_what_a_shard_loads_no_collection_visits_while_it_serves(tmp_path: Path, monkeypatch):
    events = []
    monkeypatch.setattr(gc, "freeze", lambda: events.append("frozen"))
    monkeypatch.setattr(app, "announce_ready", lambda *_: events.append("ready"))
    config = ShardConfig(model_dir="", model_id="toy", shard_uris=[f"unix:{tmp_path}/shard"])
    ended = asyncio.run(app.serve(config, ShardParts(make_engine()), StoppedWhenReady()))
    assert ended == ExitCode.OK
    assert events == ["frozen", "ready"]
