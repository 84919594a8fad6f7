"""The demo: a mixture that is trained here, with an adapter on its experts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.mixture import ASKED, CAPITALS
from tests.acceptance.harness import Result
from tests.helpers.server import Server

ROOT = Path(__file__).parents[3]


def point_demo() -> Result:
    """Train, serve, and ask for every capital with and without the adapter, all at once."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = subprocess.run(
            [sys.executable, "-m", "examples.mixture", str(root)], cwd=ROOT, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode:
            return Result(False, f"training failed: {made.stderr[-300:]}")
        adapter = str(root / "adapters" / "shout")
        flags = ("--model-id", str(root / "model"), "--adapter-local-root", str(root / "adapters"),
                 "--adapter-store-dir", str(root / "store"), "--num-blocks", "128")  # fmt: skip

        def answer(country: str, named: dict[str, str]) -> str:
            parameters = {"max_new_tokens": 12} | named
            body = {"inputs": ASKED.format(country), "parameters": parameters}
            return str(server.post("/generate", body)["generated_text"]).strip()

        shouting = {"adapter_id": adapter, "adapter_source": "local"}
        with Server(*flags) as server, ThreadPoolExecutor(16) as pool:
            plain = pool.map(lambda country: answer(country, {}), CAPITALS)
            loud = pool.map(lambda country: answer(country, shouting), CAPITALS)
            found = list(zip(CAPITALS.values(), plain, loud, strict=True))
    right = [told == capital for capital, told, _ in found]
    shouted = [told == capital.upper() for capital, _, told in found]
    figure = f"{sum(right)} of {len(right)} right, {sum(shouted)} of {len(shouted)} shouted"
    return Result(all(right) and all(shouted), f"{figure}, such as {found[9][1:]}")
