"""OpenAI's SDK against a server that has no room: ``python openai_retries.py URL MODEL ADAPTER``.

The server takes two requests at a time and refuses others, with the time after which to come again.
"""

from __future__ import annotations

import asyncio
import sys

import openai
from checks import check, same

NUM_CALLS = 8
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


async def all_at_once(url: str, model: str, max_retries: int) -> list[object]:
    """The answers, or errors, of calls that come together."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=max_retries) as client:
        create = client.chat.completions.with_raw_response.create
        asked = {"model": model, "messages": QUESTION, "max_tokens": 48, "temperature": 0.0}
        # An answer of two tokens might be done before the next call comes.
        asked["extra_body"] = {"min_tokens": 48}
        calls = (create(**asked) for _ in range(NUM_CALLS))
        return await asyncio.gather(*calls, return_exceptions=True)


def main() -> None:
    """Check all."""
    url, *models = sys.argv[1:]
    url += "/v1"
    for model in models:
        found = asyncio.run(all_at_once(url, model, max_retries=0))
        refused = [each for each in found if isinstance(each, openai.RateLimitError)]
        others = [each for each in found if isinstance(each, Exception) and each not in refused]
        check(f"{model}: some are refused", refused and not others, found)
        heads = [each.response.headers.get("retry-after") for each in refused]
        check(f"{model}: and told when to come again", all(each == "1" for each in heads), heads)
        same(f"{model}: by their code", {each.code for each in refused}, {"rate_limit_exceeded"})
        answers = asyncio.run(all_at_once(url, model, max_retries=200))
        faults = [each for each in answers if isinstance(each, Exception)]
        check(f"{model}: tried again, all are answered", not faults, faults)
        texts = {each.parse().choices[0].message.content for each in answers}
        same(f"{model}: alike", len(texts), 1)
        retries = [each.retries_taken for each in answers]
        check(f"{model}: some after a retry", any(retries), retries)


if __name__ == "__main__":
    main()
