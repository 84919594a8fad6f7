"""The embedded model and its demo adapters by names of the operator's choosing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.helpers.server import Server

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
QUESTION = "I love how the sea looks today. What do you think?"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = (
        "--lora-modules", f"jack={ADAPTERS}/pirate", f'{{"name": "j2", "path": "{ADAPTERS}/pirate"}}',
        "--lora-adapters", f"mood={ADAPTERS}/sentiment", "--served-model-name", "smol", "gpt-4o",
        "--adapter-local-root", str(ADAPTERS), "--device", "cpu", "--num-blocks", "64",
    )  # fmt: skip
    with Server(*options, env={**os.environ, "OMP_NUM_THREADS": "1"}) as running:
        yield running


def answer(http: httpx.Client, **adapter: Any) -> Any:
    parameters = {"max_new_tokens": 16, "apply_chat_template": True, **adapter}
    response = http.post("/generate", json={"inputs": QUESTION, "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.json()["generated_text"]


@pytest.mark.slow
def test_demo_adapters_answer_by_their_names_and_share_what_is_one(server: Server) -> None:
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
        body = {"lora_name": "json", "lora_path": f"{ADAPTERS}/json-only"}
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
