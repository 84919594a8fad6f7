"""Adapters replaced and unloaded while requests use them, on a server as a user starts it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

import pytest
from tests.helpers.peft_folders import load_adapter, logits_of, save_adapter
from tests.helpers.server import Server

NUM_TOKENS, NUM_CALLERS = 120, 4
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Answer(NamedTuple):
    """An answer and when it was asked for and there."""

    start: float
    end: float
    tokens: list[int]


class Callers:
    """Threads that ask for an adapter again and again until they are told to stop."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self.answers: list[Answer] = []
        self.failures: list[Exception] = []
        self._server, self._body = server, body
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run) for _ in range(NUM_CALLERS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            start = time.perf_counter()
            try:
                details = self._server.post("/generate", self._body)["details"]
            except Exception as error:  # whatever it is, the test shows it
                self.failures.append(error)
                return
            tokens = [token["id"] for token in details["tokens"]]
            with self._changed:
                self.answers.append(Answer(start, time.perf_counter(), tokens))
                self._changed.notify_all()

    def wait_for(self, count: int, since: float = 0.0) -> None:
        """Return when so many answers are there that were asked for after a moment."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: sum(each.start > since for each in self.answers) >= count, 60
            ), self.failures

    def finish(self) -> None:
        """Let the last answers come."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.failures


def peft_tokens(model: Path, folder: Path, prompt: list[int], count: int) -> list[int]:
    """Return PEFT's greedy continuation."""
    peft = load_adapter(model, folder)
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(peft, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def folders(tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter in a served folder, and another one that will replace it."""
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    old = save_adapter(tiny_model, tmp_path / "served" / "poet", seed=1, **options)
    new = save_adapter(tiny_model, tmp_path / "new", seed=2, **options)
    return old, new


def test_an_adapter_replaced_in_use_answers_old_requests_as_old_and_new_ones_as_new(
    launch: Callable[..., Server], tiny_model: Path, tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    served, new = folders
    named = {"adapter_id": str(served), "adapter_source": "local"}
    asked = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True, "details": True}
    body = {"inputs": "the quick brown fox", "parameters": {**asked, **named}}
    options = (
        "--adapter-local-root",
        str(served.parent),
        "--adapter-store-dir",
        str(tmp_path / "s"),
    )
    with launch(*options) as server:
        first = server.post("/generate", {**body, "parameters": {
            **body["parameters"], "decoder_input_details": True,
        }})["details"]  # fmt: skip
        prompt = [token["id"] for token in first["prefill"]]
        as_old = peft_tokens(tiny_model, served, prompt, NUM_TOKENS)
        as_new = peft_tokens(tiny_model, new, prompt, NUM_TOKENS)
        assert as_old != as_new
        callers = Callers(server, body)
        callers.wait_for(2 * NUM_CALLERS)
        for name in FILES:
            (new / name).replace(served / name)
        before = time.perf_counter()
        server.manage("reload", named)
        after = time.perf_counter()
        callers.wait_for(2 * NUM_CALLERS, since=after)
        callers.finish()
        listed = json.loads(server.get("/v1/adapters"))["adapters"]
    answers = callers.answers
    assert all(each.tokens in (as_old, as_new) for each in answers)
    assert all(each.tokens == as_new for each in answers if each.start > after)
    # Those that ran already when the adapter was replaced.
    running = [each for each in answers if each.start < before < each.end]
    assert running
    assert any(each.tokens == as_old for each in running)
    assert [each["adapter_id"] for each in listed] == [served.name]
    assert listed[0]["running"] == 0


def test_an_adapter_unloaded_in_use_finishes_its_requests_then_is_gone(
    launch: Callable[..., Server], tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    served, _ = folders
    store = tmp_path / "store"
    named = {"adapter_id": str(served), "adapter_source": "local"}
    asked = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True, "details": True}
    body = {"inputs": "the quick brown fox", "parameters": {**asked, **named}}
    options = ("--adapter-local-root", str(served.parent), "--adapter-store-dir", str(store))
    with launch(*options) as server:
        callers = Callers(server, body)
        callers.wait_for(NUM_CALLERS)
        for _ in range(5):
            freed = server.manage("unload", named)
            assert freed["state"] == "unloaded"
            callers.wait_for(NUM_CALLERS, since=time.perf_counter())
        callers.finish()
        server.manage("unload", named)
        assert json.loads(server.get("/v1/adapters"))["adapters"] == []
        assert list((store / "entries").iterdir()) == []
        info = server.get("/metrics")
    assert 'running_lora_adapters=""' in info
    assert len({tuple(each.tokens) for each in callers.answers}) == 1


def test_names_are_asked_for_anew_by_hand_and_are_one_however_they_are_spelled(
    launch: Callable[..., Server], tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    served, new = folders
    root = served.parent
    one, two = (shutil.copytree(served, root / name) for name in ("one", "two"))
    options = ("--adapter-local-root", str(root), "--adapter-store-dir", str(tmp_path / "s"))

    with launch(*options) as server:

        def named(adapter: str) -> dict[str, str]:
            return {"adapter_id": adapter, "adapter_source": "local"}

        def answer(adapter: str) -> str:
            parameters = {"max_new_tokens": 20, "ignore_eos_token": True, **named(adapter)}
            body = {"inputs": "the quick brown fox", "parameters": parameters}
            return str(server.post("/generate", body)["generated_text"])

        def listed() -> dict[str, Any]:
            entries = json.loads(server.get("/v1/adapters"))["adapters"]
            return {each["adapter_id"]: each for each in entries}

        old = answer("two")
        for spelling in ("one", "./one", "one/", str(one), f"{root}//./one"):
            assert answer(spelling) == old
        assert listed().keys() == {"one", "two"}
        # The other name holds the content, and what it was when it was copied is in the store.
        server.manage("unload", named(str(one)))
        for name in FILES:
            shutil.copy(new / name, one / name)
        loaded = server.manage("load", named("one"))
        assert loaded["content_digest"] != listed()["two"]["content_digest"]
        assert answer("one/") != old
        assert answer("two") == old
        with pytest.raises(HTTPError) as missing:
            answer("three")
        assert missing.value.code == 422
        missing.value.close()
        shutil.copytree(new, root / "three")
        assert server.manage("load", named("three"))["state"] == "resident"
        (two / FILES[0]).write_text("{")
        with pytest.raises(HTTPError) as broken:
            server.manage("reload", named("two"))
        broken.value.close()
        assert answer("two") == old
        assert listed()["two"]["failure"]["reason"] in ("refused", "corrupt")
