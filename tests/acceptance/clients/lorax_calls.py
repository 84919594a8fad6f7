"""lorax-client, unmodified: ``python lorax_calls.py URL MODEL ADAPTER``."""

from __future__ import annotations

import asyncio
import json
import sys

from checks import check, drained, raises, raises_later, same
from lorax import AsyncClient, Client, MergedAdapters
from lorax.errors import GenerationError, UnprocessableEntityError, ValidationError

PROMPT = "The capital of France is"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "is_capital": {"type": "boolean"}},
    "required": ["name", "is_capital"],
}


def texts(client: Client, adapter: str | None) -> str:
    """A text, whole and streamed; returns it."""
    asked = {"prompt": PROMPT, "adapter_id": adapter, "max_new_tokens": 8}
    answer = client.generate(**asked)
    text, details = answer.generated_text, answer.details
    check(f"{adapter}: a text", text, answer)
    same(f"{adapter}: its reason", details.finish_reason.value, "length")
    same(f"{adapter}: its tokens", len(details.tokens), details.generated_tokens)
    same(f"{adapter}: their texts", "".join(each.text for each in details.tokens), text)
    check(f"{adapter}: tokens of the prompt", details.prompt_tokens > 3, details)
    events = list(client.generate_stream(**asked))
    same(f"{adapter}: streamed as whole", "".join(each.token.text for each in events), text)
    same(f"{adapter}: the last event", events[-1].generated_text, text)
    same(f"{adapter}: its details", events[-1].details.generated_tokens, 8)
    plain = client.generate(**asked, details=False)
    same(f"{adapter}: without details", (plain.generated_text, plain.details), (text, None))
    return text


def options(client: Client, adapter: str) -> None:
    """What else a request may ask for."""
    asked = {"prompt": PROMPT, "adapter_id": adapter, "max_new_tokens": 8}
    drawn = [client.generate(**asked, do_sample=True, seed=7, temperature=0.9) for _ in range(2)]
    same("a seed repeats", drawn[0].generated_text, drawn[1].generated_text)
    same("and is told", drawn[0].details.seed, 7)
    stopped = client.generate(PROMPT, max_new_tokens=64, stop_sequences=["."])
    check("a stop sequence stays", stopped.generated_text.endswith("."), stopped)
    same("and is the reason", stopped.details.finish_reason.value, "stop_sequence")
    told = client.generate(**asked, decoder_input_details=True).details
    same("the prompt's tokens", len(told.prefill), told.prompt_tokens)
    same("of which the first has no logprob", told.prefill[0].logprob, None)
    best = client.generate(**asked, do_sample=True, best_of=2)
    same("best_of", len(best.details.best_of_sequences), 1)
    several = client.generate(**asked, return_k_alternatives=3).details.tokens
    same("alternatives", {len(each.alternative_tokens) for each in several}, {3})
    full = client.generate(**asked, return_full_text=True)
    check("the full text", full.generated_text.startswith(PROMPT), full)
    form = {"type": "json_object", "schema": SCHEMA}
    bound = client.generate("A city:", max_new_tokens=64, response_format=form)
    same("a schema", set(json.loads(bound.generated_text)), set(SCHEMA["required"]))
    with_adapter = client.generate(
        "A city:", adapter_id=adapter, max_new_tokens=64, response_format=form
    )
    same("with an adapter", set(json.loads(with_adapter.generated_text)), set(SCHEMA["required"]))


def adapters(client: Client, adapter: str, text: str) -> None:
    """An adapter by its source, and merged."""
    asked = {"prompt": PROMPT, "max_new_tokens": 8}
    by_source = client.generate(**asked, adapter_id=adapter, adapter_source="local")
    same("by its source", by_source.generated_text, text)
    for number, expected in ((1, text), (2, None)):
        merged = MergedAdapters(
            ids=[adapter] * number, weights=[1.0 / number] * number, merge_strategy="linear",
            density=1.0,
        )  # fmt: skip
        found = client.generate(**asked, merged_adapters=merged).generated_text
        check(f"{number} merged", found == (expected or found) and found, found, expected)


def refusals(client: Client) -> None:
    """Errors arrive as the client's own types."""
    for name, asked, kind in (
        ("too long", {"prompt": PROMPT, "max_new_tokens": 10**7}, ValidationError),
        ("an empty prompt", {"prompt": "", "max_new_tokens": 4}, ValidationError),
        (
            "an unknown adapter",
            {"prompt": PROMPT, "adapter_id": "nobody", "adapter_source": "local"},
            (ValidationError, GenerationError, UnprocessableEntityError),
        ),
    ):
        error = raises(name, kind, client.generate, **asked)
        check(f"{name}: in words", str(error), error)
        raises(f"{name}, streamed", kind, drained, client.generate_stream, **asked)


async def asynchronous(url: str, adapter: str, text: str) -> None:
    """The asynchronous client, several calls at once."""
    client = AsyncClient(url, timeout=300)
    asked = {"prompt": PROMPT, "adapter_id": adapter, "max_new_tokens": 8}
    several = await asyncio.gather(*(client.generate(**asked) for _ in range(4)))
    same("four at once", [each.generated_text for each in several], [text] * 4)
    parts = [each.token.text async for each in client.generate_stream(**asked)]
    same("async stream", "".join(parts), text)
    too_long = {"prompt": PROMPT, "max_new_tokens": 10**7}
    await raises_later("async: too long", ValidationError, client.generate, **too_long)


def main() -> None:
    """Check all."""
    url, _, adapter = sys.argv[1:]
    client = Client(url, timeout=300)
    made = {name: texts(client, name) for name in (None, adapter)}
    same("the adapter writes otherwise", len(set(made.values())), 2)
    options(client, adapter)
    adapters(client, adapter, made[adapter])
    refusals(client)
    asyncio.run(asynchronous(url, adapter, made[adapter]))


if __name__ == "__main__":
    main()
