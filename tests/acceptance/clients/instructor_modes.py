"""Instructor over OpenAI's SDK, unmodified: ``python instructor_modes.py URL MODEL ADAPTER``."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

import instructor
import openai
from checks import check, raises
from instructor import Mode
from instructor.core import IncompleteOutputException, InstructorRetryException
from pydantic import BaseModel, Field

# Modes in which the server binds the output to the schema.
BOUND = (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA)


class City(BaseModel):
    """What an answer is bound to."""

    name: str = Field(max_length=20)
    is_capital: bool


class Animal(BaseModel):
    """One of several."""

    kind: Literal["cat", "dog", "bird"]


class Animals(BaseModel):
    """A bounded list."""

    all: list[Animal] = Field(min_length=2, max_length=3)


def wanted(name: str, **more: Any) -> dict[str, Any]:
    """The arguments of a call."""
    question = {"role": "user", "content": "What is the capital of France?"}
    return {
        "model": name, "messages": [question], "temperature": 0.0, "max_tokens": 96,
        "max_retries": 0, "response_model": City, **more,
    }  # fmt: skip


def bound(url: str, name: str, mode: Mode) -> None:
    """What is bound to a schema fits it, whole, in parts and one by one."""
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none"), mode=mode)
    at = f"{name}: {mode.name}"
    city, raw = client.chat.completions.create_with_completion(**wanted(name))
    check(f"{at}: a model", isinstance(city, City), city)
    check(f"{at}: its completion", raw.usage.completion_tokens > 0, raw)
    parts = list(client.chat.completions.create_partial(**wanted(name)))
    # Its schema lets fields be absent, so the answer may be another one.
    check(f"{at}: in parts", any(parts[-1].model_dump().values()), parts)
    check(f"{at}: as it forms", len(parts) > 1, parts)
    several = client.chat.completions.create(**wanted(name, response_model=Animals))
    check(f"{at}: a list", 2 <= len(several.all) <= 3, several)
    if mode is Mode.JSON_SCHEMA:
        # Its schema of several is fit by an empty object, which Instructor cannot read.
        return
    found = client.chat.completions.create_iterable(
        **wanted(name, response_model=Animal, max_tokens=200)
    )
    kinds = [type(each) for each, _ in zip(found, range(3))]
    check(f"{at}: one by one", set(kinds) == {Animal}, kinds)


def told(url: str, name: str) -> None:
    """Mode JSON tells the model of the schema, and binds the output to JSON."""
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none"), mode=Mode.JSON)
    seen: list[Any] = []
    client.on("completion:response", seen.append)
    try:
        city = client.chat.completions.create(**wanted(name))
        check(f"{name}: JSON: a model", isinstance(city, City), city)
    except (IncompleteOutputException, InstructorRetryException) as error:
        # A small model may write other fields than it was told, or go on: JSON it is.
        print(f"{name}: JSON: {error}"[:300])
    content = seen[0].choices[0].message.content
    check(f"{name}: JSON: an object", content.lstrip().startswith("{"), content)


def refused(url: str, name: str) -> None:
    """An error of the server is not taken for an answer to be mended."""
    client = instructor.from_openai(
        openai.OpenAI(base_url=url, api_key="none", max_retries=0), mode=Mode.TOOLS
    )
    asked = wanted("local:nobody")
    create = client.chat.completions.create
    error = raises("an unknown model", InstructorRetryException, create, **asked)
    check("and why", "nobody" in str(error), error)


def responses(url: str, name: str) -> None:
    """Instructor on Responses."""
    client = instructor.from_openai(
        openai.OpenAI(base_url=url, api_key="none"), mode=Mode.RESPONSES_TOOLS
    )
    asked = wanted(name)
    asked["max_output_tokens"] = asked.pop("max_tokens")
    asked["input"] = asked.pop("messages")
    city = client.responses.create(**asked)
    check(f"{name}: RESPONSES_TOOLS", isinstance(city, City), city)


async def asynchronous(url: str, name: str, mode: Mode) -> None:
    """The asynchronous client, several calls at once."""
    sdk = openai.AsyncOpenAI(base_url=url, api_key="none")
    client = instructor.from_openai(sdk, mode=mode)
    several = await asyncio.gather(
        *(client.chat.completions.create(**wanted(name)) for _ in range(3))
    )
    check(f"async: {mode.name}", all(isinstance(each, City) for each in several), several)
    parts = [each async for each in client.chat.completions.create_partial(**wanted(name))]
    check(f"async: {mode.name}: in parts", any(parts[-1].model_dump().values()), parts)


async def all_asynchronous(url: str, name: str) -> None:
    """The same in all modes."""
    for mode in BOUND:
        await asynchronous(url, name, mode)


def main() -> None:
    """Check all."""
    url, *models = sys.argv[1:]
    url += "/v1"
    for name in models:
        for mode in BOUND:
            bound(url, name, mode)
        told(url, name)
        responses(url, name)
    refused(url, models[0])
    asyncio.run(all_asynchronous(url, models[1]))


if __name__ == "__main__":
    main()
