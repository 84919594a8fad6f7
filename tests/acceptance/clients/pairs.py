"""Asks each question whole and streamed, and says where the two differ."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.acceptance.clients.answers import Answer, Asker, Clients, Json
from tests.acceptance.suites import ROOT
from tests.helpers.chat_formats import FORMATS
from tests.helpers.server import Server, free_port

ADAPTERS = ROOT / "examples/adapters"
# Enough for the rows of a batch to change all the while.
NUM_AT_ONCE = 24
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Adapters that bring a chat template of their own, each of another form of calls.
OWN_TEMPLATES = {
    "llama3_json": FORMATS["headers"],
    "mistral": FORMATS["brackets"],
    "pythonic": "{# <|python_start|> #}" + _CHATML,
    "qwen3_coder": "{# <function= <parameter= #}" + _CHATML,
}


@dataclass(frozen=True, slots=True)
class Pair:
    """One question in the words of a dialect."""

    ask: Asker
    body: Json
    # For the report.
    label: str


@dataclass
class Outcome:
    """What became of all pairs."""

    num_pairs: int = 0
    # Whose answers differed beside others, and were the same alone: numbers of rows change rounding.
    num_asked_again: int = 0
    faults: list[str] = field(default_factory=list)
    answers: list[tuple[Pair, Answer]] = field(default_factory=list)


@contextlib.contextmanager
def served() -> Iterator[tuple[str, str]]:
    """A server with all forms of calls: the base's is Hermes', adapters' are their own."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = folder / "tags.jinja"
        template.write_text(FORMATS["tags"])
        for form, text in OWN_TEMPLATES.items():
            shutil.copytree(ADAPTERS / "pirate", folder / "adapters" / form)
            (folder / "adapters" / form / "chat_template.jinja").write_text(text)
        shutil.copytree(ADAPTERS / "pirate", folder / "adapters" / "hermes")
        options = (
            "--served-model-name", "base", "--grpc-port", address.rpartition(":")[2],
            "--adapter-local-root", str(folder / "adapters"), "--chat-template", str(template),
        )  # fmt: skip
        with Server(*options) as server:
            yield server.url, address


@contextlib.asynccontextmanager
async def connected(url: str, address: str) -> AsyncIterator[Clients]:
    """Connections that are closed at the end."""
    clients = Clients(url, address)
    try:
        yield clients
    finally:
        await clients.close()


async def ask_all(clients: Clients, pairs: Sequence[Pair]) -> Outcome:
    """Ask several at once; what differs is asked again alone."""
    room, outcome = asyncio.Semaphore(NUM_AT_ONCE), Outcome()
    differing: list[Pair] = []

    async def ask(pair: Pair) -> None:
        async with room:
            try:
                whole, streamed = await pair.ask(clients, pair.body)
            except Exception as error:
                outcome.faults.append(f"{pair.label}: {type(error).__name__}: {error}"[:600])
                return
        outcome.num_pairs += 1
        outcome.answers.append((pair, whole))
        if not whole.is_like(streamed):
            differing.append(pair)

    await asyncio.gather(*map(ask, pairs))
    for pair in differing:
        whole, streamed = await pair.ask(clients, pair.body)
        if whole.is_like(streamed):
            outcome.num_asked_again += 1
        else:
            said = f"\n    whole    {whole}\n    streamed {streamed}"
            outcome.faults.append(f"{pair.label}: {json.dumps(pair.body)[:600]}{said}")
    return outcome
