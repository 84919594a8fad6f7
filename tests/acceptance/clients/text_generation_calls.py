"""TGI's text-generation, unmodified: ``python text_generation_calls.py URL MODEL ADAPTER``.

It has no argument for an adapter: a server whose own adapter it is would answer with it.
"""

from __future__ import annotations

import asyncio
import json
import sys

from checks import check, drained, raises, raises_later, same
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Grammar, GrammarType, Message, Tool

PROMPT = "The capital of France is"
QUESTION = [Message(role="user", content="What is the capital of France?")]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "is_capital": {"type": "boolean"}},
    "required": ["name", "is_capital"],
}
TOOL = Tool(
    type="function",
    function={
        "name": "get_weather",
        "description": "Tell the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
)
# Each names its tool alone, as this client must.
CHOICE = "get_weather"


def texts(client: Client) -> str:
    """A text, whole and streamed; returns it."""
    asked = {"prompt": PROMPT, "max_new_tokens": 8}
    answer = client.generate(**asked)
    text, details = answer.generated_text, answer.details
    check("a text", text, answer)
    same("its reason", details.finish_reason.value, "length")
    same("its tokens", len(details.tokens), details.generated_tokens)
    events = list(client.generate_stream(**asked))
    same("streamed as whole", "".join(each.token.text for each in events), text)
    same("the last event", events[-1].generated_text, text)
    same("its details", events[-1].details.generated_tokens, 8)
    stopped = client.generate(PROMPT, max_new_tokens=64, stop_sequences=["."])
    check("a stop sequence stays", stopped.generated_text.endswith("."), stopped)
    same("and is the reason", stopped.details.finish_reason.value, "stop_sequence")
    drawn = [client.generate(**asked, do_sample=True, seed=7) for _ in range(2)]
    same("a seed repeats", drawn[0].generated_text, drawn[1].generated_text)
    told = client.generate(**asked, decoder_input_details=True).details
    check("the prompt's tokens", len(told.prefill) > 3, told)
    best = client.generate(**asked, do_sample=True, best_of=2)
    same("best_of", len(best.details.best_of_sequences), 1)
    for kind, value in ((GrammarType.Json, SCHEMA), (GrammarType.Regex, "[0-9]{4}")):
        grammar = Grammar(type=kind, value=value)
        written = client.generate("A city:", max_new_tokens=64, grammar=grammar).generated_text
        fits = (
            set(json.loads(written)) == set(SCHEMA["required"])
            if kind == "json"
            else len(written) == 4
        )
        check(f"grammar {kind.value}", fits, written)
    return text


def chats(client: Client) -> str:
    """Chats, and a tool that must be called; returns a text."""
    asked = {"messages": QUESTION, "max_tokens": 24, "seed": 1, "temperature": 0.01}
    answer = client.chat(**asked)
    text = answer.choices[0].message.content
    check("a chat", text and answer.usage["completion_tokens"] > 0, answer)
    called = client.chat(**{**asked, "max_tokens": 64}, tools=[TOOL], tool_choice=CHOICE)
    (call,) = called.choices[0].message.tool_calls
    same("a tool", set(json.loads(call["function"]["arguments"])), {"city"})
    return text


def refusals(client: Client) -> None:
    """Errors arrive as the client's own types."""
    asked = {"prompt": PROMPT, "max_new_tokens": 10**7}
    error = raises("too long", ValidationError, client.generate, **asked)
    check("too long: in words", str(error), error)
    raises("too long, streamed", ValidationError, drained, client.generate_stream, **asked)


async def asynchronous(url: str, text: str, said: str) -> None:
    """The asynchronous client, several calls at once."""
    client = AsyncClient(url, timeout=300)
    asked = {"prompt": PROMPT, "max_new_tokens": 8}
    several = await asyncio.gather(*(client.generate(**asked) for _ in range(4)))
    same("four at once", [each.generated_text for each in several], [text] * 4)
    parts = [each.token.text async for each in client.generate_stream(**asked)]
    same("async stream", "".join(parts), text)
    answer = await client.chat(messages=QUESTION, max_tokens=24, seed=1, temperature=0.01)
    same("async chat", answer.choices[0].message.content, said)
    too_long = {"prompt": PROMPT, "max_new_tokens": 10**7}
    await raises_later("async: too long", ValidationError, client.generate, **too_long)


def main() -> None:
    """Check all."""
    url = sys.argv[1]
    client = Client(url, timeout=300)
    text, said = texts(client), chats(client)
    refusals(client)
    asyncio.run(asynchronous(url, text, said))


if __name__ == "__main__":
    main()
