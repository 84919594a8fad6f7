"""OpenAI's routes over a scripted engine: what goes in and comes out of the dialect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.http_app import World

from lorax_contract.step import Alternatives, FinishCode, RequestSpec, TokenColumns
from lorax_router.service.engine.port import TokenChunk

DONE = "[DONE]"


def spoken(
    *texts: str,
    finish: FinishCode = FinishCode.EOS_TOKEN,
    special: Sequence[int] = (),
    num_top: int = 0,
) -> Iterator[TokenChunk]:
    """A token for each text; an end token follows if one ends the text."""
    if finish is FinishCode.EOS_TOKEN:
        texts, special = (*texts, "</s>"), (*special, len(texts))
    for place, text in enumerate(texts):
        is_last = place == len(texts) - 1
        top = Alternatives([0, 1], [-0.25, -2.0], [text, "other"])
        yield TokenChunk(
            TokenColumns([100 + place], [-0.25], [text], [place in special]),
            finish if is_last else FinishCode.RUNNING,
            [top] * bool(num_top),
            generated_text="" if is_last else None,
        )


@dataclass
class Session:
    """Calls of one world's routes."""

    world: World = field(default_factory=World)

    async def post(self, path: str, **body: Any) -> Any:
        """The answer to a request."""
        async with self.world.client() as client:
            return await client.post(path, json=body)

    async def complete(self, **body: Any) -> dict[str, Any]:
        """A completion that works."""
        answer = await self.post("/v1/completions", **{"prompt": "w1 w2", **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def chat(self, *said: str, **body: Any) -> dict[str, Any]:
        """A chat completion that works."""
        answer = await self.post("/v1/chat/completions", **self.chat_body(*said, **body))
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The parts of a streamed answer, which ends as it has to."""
        answer = await self.post(path, stream=True, **body)
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
        assert answer.status_code == 200
        data = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
        assert data[-1] == DONE
        return [json.loads(each) for each in data[:-1]]

    def says(self, *texts: str, **options: Any) -> None:
        """Let every sequence say this."""

        def script(spec: RequestSpec) -> Iterator[TokenChunk]:
            return spoken(*texts, num_top=spec.sampling.num_alternatives, **options)

        self.world.engine.script = script

    @staticmethod
    def chat_body(*said: str, **body: Any) -> dict[str, Any]:
        """A conversation in which a user says something."""
        messages = [{"role": "user", "content": text} for text in said or ("w1",)]
        return {"messages": messages, **body}
