"""Whatever bodies come: no 500, an error in JSON, and the server lives on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers.http_app import World, events

from lorax_router.http_api.lorax.bodies import ParametersBody

NAMES = sorted(ParametersBody.model_fields)
PATHS = ("/", "/invocations", "/generate", "/generate_stream", "/tokenize")

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-5, 40)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["w1", "w1 w2", "\x00", "\n", "__base_model__", "ünï"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
parameters = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), values, max_size=6)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.sampled_from(["w1", "w1 w2 w3", ""]) | values,
        "parameters": parameters | values,
        "stream": values,
        "add_special_tokens": values,
    },
)
raw = (
    st.binary(max_size=60)
    | bodies.map(lambda body: json.dumps(body).encode())
    | bodies.map(
        lambda body: json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")[:-3]
    )
)

FUZZ = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


class Fuzzed:
    """One application and one loop for all examples."""

    def __init__(self) -> None:
        self.world = World()
        self.loop = asyncio.new_event_loop()

    def post(self, path: str, content: bytes) -> Any:
        async def run() -> Any:
            async with self.world.client() as client:
                headers = {"content-type": "application/json"}
                response = await client.post(path, content=content, headers=headers)
                alive = await client.post("/generate", json={"inputs": "w1"})
            assert alive.status_code == 200
            return response

        return self.loop.run_until_complete(run())


def test_no_body_breaks_the_server():
    fuzzed = Fuzzed()
    seen = set()

    @FUZZ
    @given(st.sampled_from(PATHS), raw)
    def check(path: str, content: bytes) -> None:
        response = fuzzed.post(path, content)
        seen.add(response.status_code)
        assert response.status_code in {200, 400, 422}, response.text
        if response.status_code != 200:
            document = json.loads(response.content)
            assert set(document) == {"error", "error_type"}
        elif response.headers["content-type"] == "text/event-stream":
            assert all(each.get("error_type") != "internal" for each in events(response.text))

    try:
        check()
    finally:
        fuzzed.loop.close()
    # The examples reached all outcomes, so the strategies are not blind.
    assert seen == {200, 400, 422}
