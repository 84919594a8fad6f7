"""A server whose weights have an adapter in them, started as a user does."""

from __future__ import annotations

import json
import subprocess
import urllib.error
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.acceptance.reference import Reference, Served
from tests.helpers.peft_folders import load_adapter, save_adapter
from tests.helpers.server import Server

from lorax_contract.exit_codes import ExitCode

TEXTS = ("the quick brown fox", "a request names the adapter", "blocks that a table lists")
MERGE = ("--merge-adapter-weights", "--adapter-source", "local", "--adapter-id")


class PeftReference(Reference):
    """The rule of teacher forcing, against PEFT's model."""

    def __init__(self, model_dir: Path, adapter: Path) -> None:
        self._model = load_adapter(model_dir, adapter)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_merged_adapter_answers_and_others_are_refused(
    launch: Callable[..., Server], tiny_model: Path, tmp_path: Path, num_ranks: int
) -> None:
    adapter = save_adapter(
        tiny_model, tmp_path / "adapter", r=4, target_modules="all-linear", use_dora=True
    )
    store = ("--adapter-store-dir", str(tmp_path / "store"))
    if num_ranks > 1:
        store += ("--num-shard", str(num_ranks), "--cache-dir", str(tmp_path / "cache"))
    with launch(*MERGE, str(adapter), *store) as server:
        answers = []
        for text in TEXTS:
            parameters = {"max_new_tokens": 12, "decoder_input_details": True, "details": True}
            details = server.post("/generate", {"inputs": text, "parameters": parameters})[
                "details"
            ]
            answers.append(
                Served(
                    [token["id"] for token in details["prefill"]],
                    [token["id"] for token in details["tokens"]],
                    [token["logprob"] for token in details["tokens"]],
                )
            )
        other = {"adapter_id": str(adapter), "adapter_source": "local"}
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.post("/generate", {"inputs": "a", "parameters": other})
        refusal = json.loads(caught.value.read())
    assert caught.value.code == 422
    assert "--merge-adapter-weights" in refusal["error"]
    verdict = PeftReference(tiny_model, adapter).check_greedy(answers)
    assert verdict.ok, verdict
    assert not Reference(tiny_model).check_greedy(answers).ok


def test_an_adapter_that_cannot_be_merged_ends_the_start_in_words(
    launch: Callable[..., Server], tiny_model: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tiny_model, tmp_path / "adapter", target_modules=["q_proj"])
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_qalora": True}))
    store = ("--adapter-store-dir", str(tmp_path / "store"))
    for name, words in ((str(adapter), "use_qalora"), (str(tmp_path / "nobody"), "is no folder")):
        # Its own words, whichever child says them.
        server = launch(*MERGE, name, *store)
        done = subprocess.run(
            server._command, env=server._env, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == ExitCode.ADAPTER_UNUSABLE, done.stdout
        assert words in done.stdout.splitlines()[-1]
        assert "Traceback" not in done.stdout
