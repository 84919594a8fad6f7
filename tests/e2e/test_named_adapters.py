"""Adapters by names of the operator's choosing, on a server as a user starts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.helpers.peft_folders import save_adapter
from tests.helpers.server import Server

QUESTION = "I love how the sea looks today. What do you think?"


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the adapters lie that may be served."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("pirate", "sentiment", "json-only")):
        save_adapter(tiny_model, root / name, seed=seed, r=4, target_modules=["q_proj", "o_proj"])
    return root


@pytest.fixture(scope="module", params=["0", "2"], ids=["one process", "two fronts"])
def server(
    request: pytest.FixtureRequest, launch: Callable[..., Server], adapters: Path
) -> Iterator[Server]:
    options = (
        "--http-workers", request.param,
        "--lora-modules", f"jack={adapters}/pirate", f'{{"name": "j2", "path": "{adapters}/pirate"}}',
        "--lora-adapters", f"mood={adapters}/sentiment", "--served-model-name", "smol", "gpt-4o",
        "--adapter-local-root", str(adapters), "--adapter-store-dir", f"{adapters}-store",
    )  # fmt: skip
    with launch(*options) as running:
        yield running


def answer(http: httpx.Client, **adapter: Any) -> Any:
    parameters = {"max_new_tokens": 16, "ignore_eos_token": True, **adapter}
    response = http.post("/generate", json={"inputs": QUESTION, "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.json()["generated_text"]


def test_adapters_answer_by_their_names_and_share_what_is_one(
    server: Server, adapters: Path
) -> None:
    with httpx.Client(base_url=server.url, timeout=120) as http:
        base = answer(http)
        by_id = answer(http, adapter_id="pirate", adapter_source="local")
        assert answer(http, adapter_id="jack") == answer(http, adapter_id="j2") == by_id != base
        assert answer(http, adapter_id="mood") not in (base, by_id)

        listed = {each["adapter_id"]: each for each in http.get("/v1/adapters").json()["adapters"]}
        digests = {listed[name]["content_digest"] for name in ("jack", "j2", "pirate")}
        assert len(digests) == 1
        assert listed["jack"]["pinned"] and listed["mood"]["pinned"]
        held = next(
            line
            for line in http.get("/metrics").text.splitlines()
            if line.startswith("lorax_adapter_slots_held ")
        )
        assert float(held.split()[1]) == 2

        cards = {each["id"]: each for each in http.get("/v1/models").json()["data"]}
        assert set(cards) == {"smol", "gpt-4o", "jack", "j2", "mood", "local:pirate"}
        assert {each["parent"] for each in cards.values()} == {None, "smol"}

        admin = f"http://127.0.0.1:{server.admin_port}"
        body = {"lora_name": "json", "lora_path": f"{adapters}/json-only"}
        loaded = http.post(f"{admin}/v1/load_lora_adapter", json=body)
        assert loaded.text == "Success: LoRA adapter 'json' added successfully."
        assert answer(http, adapter_id="json") not in (base, by_id)
        for name in ("jack", "j2"):
            gone = http.post(f"{admin}/v1/unload_lora_adapter", json={"lora_name": name})
            assert gone.status_code == 200
            # The content stays for the name that is left.
            assert answer(http, adapter_id="pirate", adapter_source="local") == by_id
        assert http.get("/v1/models/jack").status_code == 404
        # Beyond the folders that the operator named nothing is read.
        outside = {"lora_name": "etc", "lora_path": "/etc"}
        refusal = http.post(f"{admin}/v1/load_lora_adapter", json=outside)
        assert refusal.status_code == 400
        assert "outside the folders" in refusal.json()["error"]["message"]
