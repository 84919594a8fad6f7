"""Two ranks behind one router, as a user starts them: they answer as one, and they end as one."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from tests.e2e.conftest import OPTIONS
from tests.helpers.group_endings import line_with, lose_under_load
from tests.helpers.marked_processes import MarkedProcesses
from tests.helpers.peft_folders import greedy_tokens, load_adapter, load_model, save_adapter
from tests.helpers.server import Server
from tokenizers import Tokenizer

PROMPT = "the quick brown fox"
NUM_TOKENS = 12


def ask(server: Server, **more: Any) -> list[int]:
    """Return the tokens of an answer."""
    parameters = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True, "details": True, **more}
    details = server.post("/generate", {"inputs": PROMPT, "parameters": parameters})["details"]
    return [token["id"] for token in details["tokens"]]


def test_ranks_answer_as_one_and_end_with_the_one_that_is_killed(
    tiny_model: Path, tmp_path: Path
) -> None:
    names = ["q_proj", "o_proj", "down_proj"]
    adapter = save_adapter(tiny_model, tmp_path / "own", r=5, target_modules=names, use_dora=True)
    ids = Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode(PROMPT).ids
    run = MarkedProcesses()
    options = (
        "--num-shard", "2", "--adapter-local-root", str(tmp_path),
        "--adapter-store-dir", str(tmp_path / "store"), "--restarts", "0",
    )  # fmt: skip
    with Server(
        "--model-id", str(tiny_model), *OPTIONS, *options, env=run.environment(OMP_NUM_THREADS="1")
    ) as server:
        assert server.process is not None
        base = greedy_tokens(load_model(tiny_model), ids, NUM_TOKENS)
        tuned = greedy_tokens(load_adapter(tiny_model, adapter), ids, NUM_TOKENS)
        assert base != tuned
        assert ask(server) == base
        assert ask(server, adapter_id=str(adapter), adapter_source="local") == tuned
        endless = {"max_new_tokens": 400, "ignore_eos_token": True}
        body = {"inputs": PROMPT, "parameters": endless}
        last = lose_under_load(server, run.rank(1), signal.SIGKILL, body)
        assert json.loads(last.removeprefix("data:"))["error_type"] == "generation"
        assert server.process.wait(60) > 0
        assert run.left_after(10) == []
        assert "shard-1" in line_with(server, "ERROR", "SIGKILL")
