"""Use lorax-client as its users do; run by an interpreter that has only that package.

``python lorax_client_session.py URL`` prints one line per check and a count at the end;
exit code 1 if any check fails.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from lorax import AsyncClient, Client
from lorax import errors as lorax_errors

PROMPT = "The capital of France is"
checks: list[tuple[str, bool]] = []


def check(name: str, holds: bool) -> None:
    """Note and print one check."""
    checks.append((name, holds))
    print(("ok   " if holds else "FAIL ") + name)


def raises(error: type[Exception], call: Callable[[], Any]) -> bool:
    """Whether the call raises just this error."""
    try:
        call()
    except error:
        return True
    except Exception as other:
        print(f"     raised {type(other).__name__}: {other}")
    return False


def generate_sync(client: Client) -> str:
    """Check plain generation, details and sampling."""
    answer = client.generate(PROMPT, max_new_tokens=8)
    details = answer.details
    check("generate: text", len(answer.generated_text) > 0)
    check("generate: finish reason", details.finish_reason.value == "length")
    check("generate: token count", details.generated_tokens == 8 == len(details.tokens))
    check("generate: logprobs", all(token.logprob <= 0 for token in details.tokens))
    joined = "".join(token.text for token in details.tokens)
    check("generate: token texts join to the text", joined == answer.generated_text)
    same = [
        client.generate(PROMPT, max_new_tokens=12, do_sample=True, seed=7, temperature=0.9)
        for _ in range(2)
    ]
    check("generate: a seed repeats", same[0].generated_text == same[1].generated_text)
    check("generate: the seed is reported", same[0].details.seed == 7)
    stopped = client.generate(PROMPT, max_new_tokens=64, stop_sequences=["."])
    check("generate: stop sequence", stopped.generated_text.endswith("."))
    check("generate: stop reason", stopped.details.finish_reason.value == "stop_sequence")
    prefilled = client.generate(PROMPT, max_new_tokens=1, decoder_input_details=True)
    check("generate: prompt details", len(prefilled.details.prefill) == details.prompt_tokens)
    check("generate: first prompt logprob is null", prefilled.details.prefill[0].logprob is None)
    best = client.generate(PROMPT, max_new_tokens=4, do_sample=True, best_of=2)
    check("generate: best_of", len(best.details.best_of_sequences) == 1)
    several = client.generate(PROMPT, max_new_tokens=2, return_k_alternatives=3)
    alternatives = several.details.tokens[0].alternative_tokens
    check("generate: alternatives", len(alternatives) == 3)
    full = client.generate(PROMPT, max_new_tokens=2, return_full_text=True)
    check("generate: full text", full.generated_text.startswith(PROMPT))
    return answer.generated_text


def stream_sync(client: Client, expected: str) -> None:
    """Check a stream against the plain answer."""
    events = list(client.generate_stream(PROMPT, max_new_tokens=8))
    check("stream: one event per token", len(events) == 8)
    check("stream: same text", "".join(event.token.text for event in events) == expected)
    check(
        "stream: text only in the last event", [e.generated_text for e in events[:-1]] == [None] * 7
    )
    check("stream: last event has the text", events[-1].generated_text == expected)
    check("stream: last event has details", events[-1].details.generated_tokens == 8)


def errors_sync(client: Client) -> None:
    """Check that errors arrive as the client's own types."""
    too_long = lambda: client.generate(PROMPT, max_new_tokens=10_000_000)  # noqa: E731
    check("error: validation", raises(lorax_errors.ValidationError, too_long))
    empty = lambda: client.generate("", max_new_tokens=4)  # noqa: E731
    check("error: empty prompt", raises(lorax_errors.ValidationError, empty))
    stream = lambda: list(client.generate_stream(PROMPT, max_new_tokens=10_000_000))  # noqa: E731
    check("error: in a stream", raises(lorax_errors.ValidationError, stream))


async def generate_async(url: str, expected: str) -> None:
    """Check the asynchronous client."""
    client = AsyncClient(url)
    answers = await asyncio.gather(
        *(client.generate(PROMPT, max_new_tokens=8) for _ in range(4))
    )  # fmt: skip
    check("async: four at once", [a.generated_text for a in answers] == [expected] * 4)
    text = ""
    async for event in client.generate_stream(PROMPT, max_new_tokens=8):
        text += event.token.text
    check("async: stream", text == expected)
    try:
        await client.generate(PROMPT, max_new_tokens=10_000_000)
        check("async: validation error", False)
    except lorax_errors.ValidationError:
        check("async: validation error", True)


def main() -> int:
    """Run all checks."""
    url = sys.argv[1]
    client = Client(url)
    expected = generate_sync(client)
    stream_sync(client, expected)
    errors_sync(client)
    asyncio.run(generate_async(url, expected))
    failed = [name for name, holds in checks if not holds]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks hold")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
