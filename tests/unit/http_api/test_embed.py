"""LoRAX's `/embed`, as its client calls it."""

from __future__ import annotations

import numpy as np
import pytest
from tests.helpers.in_loop import in_loop
from tests.helpers.openai_world import Session

from lorax_contract.step import OutputKind


@in_loop
async def test_a_text_has_a_vector_of_length_one() -> None:
    session = Session()
    answer = await session.post("/embed", inputs="w1 w2", parameters=None, stream=False)
    assert answer.status_code == 200, answer.text
    expected = np.array([900, 2, 3, 0]) / np.linalg.norm([900, 2, 3, 0])
    assert answer.json() == {"embeddings": pytest.approx(expected.tolist())}
    assert [spec.output for spec in session.world.engine.submitted] == [OutputKind.VECTOR]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": "w1", "stream": True}, "`stream`"),
        ({"inputs": ""}, "`inputs`"),
        ({"inputs": "w1 " * 30}, "at most 20 tokens"),
        ({"inputs": "w1", "parameters": {"adapter_id": "a"}}, "the base model only"),
    ],
)
def test_faults_are_said(body: dict[str, object], words: str) -> None:
    @in_loop
    async def scene() -> None:
        answer = await Session().post("/embed", **body)
        assert answer.status_code in (400, 422)
        assert words in answer.json()["error"]

    scene()
