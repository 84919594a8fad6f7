"""A router's HTTP application around a scripted engine, and clients for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.types import ASGIApp
from tests.helpers.inline_templates import InlineTemplates
from tests.helpers.scripted_engine import ScriptedEngine
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lorax_router.http_api.app import Cors, build_app
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.dialects import BODIES, EVENTS, dialect_routers
from lorax_router.http_api.listeners import bind, url_of
from lorax_router.http_api.server import HttpServer
from lorax_router.service.abilities import Abilities
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.chat.outputs import OutputParsers, OutputsByTemplate
from lorax_router.service.inference import InferenceService
from lorax_router.service.info import BackendsInfo, MemoryInfo, ServerInfo
from lorax_router.service.limits import RequestLimits
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.models import Models
from lorax_router.service.prompts.tokenization import Tokenization
from lorax_router.service.prompts.tokenizer_pool import TokenizerPool
from lorax_router.service.validation import Validator

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer() -> Tokenizer:
    """One token per word or punctuation run: `w0` is 0; a start token 900 goes in front.

    Of two texts the second one's tokens are of another type.
    """
    vocabulary = {f"w{i}": i for i in range(900)}
    vocabulary |= {"<s>": 900, "[UNK]": 901, "<": 902, ">": 903, "user": 904, "assistant": 905}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 900)]
    )
    return tokenizer


def limits(**overrides: int) -> RequestLimits:
    """RequestLimits small enough to reach."""
    return RequestLimits(
        **{"max_input_length": 20, "max_total_tokens": 30, "vocab_size": 906, **overrides}
    )


def server_info(bounds: RequestLimits, **overrides: Any) -> ServerInfo:
    """What the test server says of itself."""
    values: dict[str, Any] = {
        "model_id": "tests/tiny",
        "model_sha": None,
        "model_dtype": "float32",
        "model_device_type": "cpu",
        "max_concurrent_requests": 8,
        "max_best_of": bounds.max_best_of,
        "max_stop_sequences": bounds.max_stop_sequences,
        "max_input_length": bounds.max_input_length,
        "max_total_tokens": bounds.max_total_tokens,
        "waiting_served_ratio": 1.2,
        "max_batch_total_tokens": 160,
        "max_waiting_tokens": 20,
        "validation_workers": 2,
        "eager_prefill": True,
        "version": "0.0.test",
        "memory": MemoryInfo.of([[("unused", 9)], [("unused", 7)]]),
        "backends": BackendsInfo(attention="sdpa", linear="panel", elementwise="cpp", lora=None),
    }
    return ServerInfo(**{**values, **overrides})


@dataclass(kw_only=True)
class World:
    """All parts of one application; made inside a running loop."""

    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    bounds: RequestLimits = field(default_factory=limits)
    max_concurrent_requests: int = 8
    max_body_bytes: int = 10_000
    # What health takes for no answer: far above what a busy machine takes for one.
    health_timeout_s: float = 60.0
    cors: Cors = field(default_factory=Cors)
    model_id: str = "tests/tiny"
    template: str | None = TEMPLATE
    outputs: OutputParsers = field(default_factory=OutputParsers)
    # Makes constraints ready; None: the server offers none.
    constraints: Any = None
    # What the model does, and how it was made to do it.
    abilities: Abilities = field(default_factory=Abilities)

    def __post_init__(self) -> None:
        bounds = self.bounds
        self.metrics = Metrics(
            model_name=self.model_id,
            max_input_length=bounds.max_input_length,
            max_total_tokens=bounds.max_total_tokens,
        )
        self.metrics.watch_engine(self.engine.stats, block_size=16)
        self.tokenizer = TokenizerPool(word_tokenizer(), 2)
        templates = self.templates = InlineTemplates(self.template)
        self.validator = Validator(bounds, self.tokenizer, templates, abilities=self.abilities)
        self.service = InferenceService(
            self.engine,
            self.validator,
            self.metrics,
            max_concurrent_requests=self.max_concurrent_requests,
            constraints=self.constraints,
            outputs=OutputsByTemplate(self.outputs),
            health_timeout_s=self.health_timeout_s,
        )
        models = Models(
            self.model_id, [], bounds.max_total_tokens, SelectionPolicy(refusal="none are served")
        )
        self.calls = Calls(
            self.service,
            models,
            self.service.ledger,
            max_body_bytes=self.max_body_bytes,
            max_concurrent_requests=self.max_concurrent_requests,
        )
        self.app = build_app(
            service=self.service,
            tokenization=Tokenization(bounds, self.tokenizer, templates),
            metrics=self.metrics,
            info=server_info(bounds, model_id=self.model_id),
            max_body_bytes=self.max_body_bytes,
            cors=self.cors,
            dialects=dialect_routers(self.calls),
            bodies=BODIES,
            events=EVENTS,
        )

    def client(self) -> httpx.AsyncClient:
        """A client that calls the application directly, without a socket."""
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://router")

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def events(text: str) -> list[Any]:
    """The data of all events of a response."""
    return [json.loads(line[5:]) for line in text.split("\n") if line.startswith("data:")]


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, **settings: Any) -> AsyncIterator[tuple[str, HttpServer]]:
    """Serve an application on a real socket; gives its URL and the server."""
    with bind("127.0.0.1", 0) as listener:
        server = HttpServer(app, listener, **settings)
        running = asyncio.create_task(server.run())
        await server.wait_started()
        try:
            yield url_of(listener), server
        finally:
            server.stop()
            await running


@contextlib.asynccontextmanager
async def served(world: World) -> AsyncIterator[str]:
    """Serve the application on a real socket; gives its URL."""
    async with serving(world.app) as (url, _):
        yield url


async def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait until a condition holds; fails the test when it never does."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
