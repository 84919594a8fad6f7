"""The server as a container runs it: read-only but for its volume and /tmp, as a user without rights."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.read_only import DATA, HERE, read_only, refusal
from tests.helpers.server import Server
from tests.helpers.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
PARAMETERS = {"max_new_tokens": 8, "ignore_eos_token": True}


@pytest.fixture
def folder() -> Iterator[Path]:
    """What the pod's volumes hold: a model, and adapters of a shared folder."""
    if reason := refusal():
        pytest.skip(f"this machine gives no read-only view: {reason}")
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        make_tiny_model("llama", path / "model")
        (path / "adapters").mkdir()
        write_formula_adapter(path / "model", path / "adapters" / "one", rank=4, seed=1)
        yield path


def image_variables() -> dict[str, str]:
    """Return where the image keeps things, with this test's volume in the place of its own."""
    text = (ROOT / "Dockerfile").read_text()
    found = dict(re.findall(r"(\w+)=/data(/\w+)", text))
    assert {"LORAX_CACHE", "HF_HOME", "TRITON_CACHE_DIR"} <= found.keys()
    return {name: f"{DATA}{place}" for name, place in found.items()}


@pytest.mark.slow
def test_it_serves_with_nothing_to_write_but_its_volume_and_tmp(folder: Path) -> None:
    variables = {
        **os.environ, **image_variables(), "OMP_NUM_THREADS": "1", "HOME": "/home/lorax",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    with Server(
        "--model-id", str(HERE / "model"), "--served-model-name", "base", "--num-blocks", "96", "--max-batch-size", "4",
        "--adapter-local-root", str(HERE / "adapters"), "--json-output",
        prefix=read_only(folder), env=variables, cwd=Path("/"),
    ) as server:  # fmt: skip
        own = {"adapter_id": str(HERE / "adapters/one"), "adapter_source": "local"}
        texts = [
            server.post("/generate", {"inputs": "the quick brown fox", "parameters": each})
            for each in (PARAMETERS, {**PARAMETERS, **own})
        ]
        server.post(
            "/v1/chat/completions",
            {
                "model": "base", "max_tokens": 4,
                "messages": [{"role": "user", "content": "the quick brown fox"}],
            },
        )  # fmt: skip
        for path in ("/health", "/startup", "/metrics"):
            server.get(path)
        assert server.stop() == 0
    assert all(each["generated_text"] for each in texts)
    assert texts[0] != texts[1]
    complaints = [
        line for line in server.lines if re.search(r"[Rr]ead-only|Permission denied", line)
    ]
    assert complaints == []
    written = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert written == {"model", "adapters", "data"}
