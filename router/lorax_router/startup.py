"""Makes a router's parts from its configuration: what can fail at start fails here, in words."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lorax_contract.config import ConfigError, RouterConfig
from lorax_contract.errors import (
    LoraxError,
    ShardUnavailableError,
    StartupError,
)
from lorax_contract.exit_codes import ExitCode
from lorax_contract.step import ShardInfo, WarmupSpec
from lorax_contract.tracing import SpanSink
from lorax_router.adapter_setup import adapters_to_preload, alias_book, own_selection
from lorax_router.core.ports import SessionSource, ShardClient
from lorax_router.core.settings import make_scheduler
from lorax_router.core_setup import Budgets, core_settings, event_log
from lorax_router.event_log.recording import recorded_scheduler
from lorax_router.service.abilities import Abilities
from lorax_router.service.accounts.ledger import RequestLedger
from lorax_router.service.adapters.aliases import AliasBook
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.directory import AdapterDirectory
from lorax_router.service.adapters.management import AdapterManager
from lorax_router.service.adapters.registry import AdapterRegistry
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.adapters.text import AdapterTexts
from lorax_router.service.adapters.tokens import TenantTokens
from lorax_router.service.chat.choice import outputs_by_template
from lorax_router.service.constraints.readiness import Constraints
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.service.inference import InferenceService
from lorax_router.service.info import BackendsInfo, MemoryInfo, ServerInfo
from lorax_router.service.keys.configured import key_store
from lorax_router.service.keys.meters import Meters
from lorax_router.service.keys.store import KeyStore
from lorax_router.service.keys.tenant_defaults import tenant_limits
from lorax_router.service.limits import (
    LARGEST_N,
    Lengths,
    RequestLimits,
    lengths_in_pool,
    lengths_of_model,
    required_length,
)
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.models import Models
from lorax_router.service.prompts.char_bound import chars_per_token
from lorax_router.service.prompts.chat_renderers import ChatRenderers
from lorax_router.service.prompts.content_format import ContentFormat
from lorax_router.service.prompts.language import Language
from lorax_router.service.prompts.renderer_pool import RenderLimits
from lorax_router.service.prompts.tokenization import Tokenization
from lorax_router.service.prompts.tokenizer_pool import TokenizerPool
from lorax_router.service.requests import BASE_MODEL_ADAPTER_ID
from lorax_router.service.validation import Validator

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp

    from lorax_router.event_log.writer import EventLogWriter
    from lorax_router.grpc_api.servicer import PublicServicer
    from lorax_router.http_api.playground.routes import PlaygroundRoutes

logger = logging.getLogger(__name__)

# Tokens that a step computes where nothing is said. While a model generates, others' next tokens
# wait for a step's end; where none does, larger steps cost less for each token.
STEP_TOKENS, POOLED_STEP_TOKENS = 512, 1024

# Seconds that a step lasts at least before it is taken for one that hangs.
_LEAST_HANG_S = 30.0


@dataclass(frozen=True, slots=True)
class PromptParts:
    """What makes token ids of requests, and grammars of what they bind outputs to."""

    tokenizer: TokenizerPool
    renderers: ChatRenderers
    adapter_texts: AdapterTexts
    constraints: Constraints

    async def close(self) -> None:
        """End all threads and processes."""
        self.tokenizer.close()
        await self.renderers.close()
        await self.adapter_texts.close()
        await self.constraints.close()


@dataclass(frozen=True, slots=True)
class ServiceParts:
    """A router without a front end."""

    engine: EngineLoop
    service: InferenceService
    prompts: PromptParts
    adapters: AdapterManager
    metrics: Metrics
    selections: SelectionPolicy
    models: Models
    tokenization: Tokenization
    # What records the scheduler's events; None: nothing does.
    events: EventLogWriter | None = None


@dataclass(frozen=True, slots=True)
class Parts:
    """A router that is ready to serve."""

    app: FastAPI
    admin_app: FastAPI
    metrics_app: ASGIApp
    keys: KeyStore
    engine: EngineLoop
    service: InferenceService
    prompts: PromptParts
    adapters: AdapterManager
    models: Models
    # Adapters that are loaded before the server is ready.
    preloads: tuple[AdapterSelection, ...]
    # The methods of the public gRPC service.
    servicer: PublicServicer
    metrics: Metrics
    selections: SelectionPolicy
    info: ServerInfo
    # What records the scheduler's events; None: nothing does.
    events: EventLogWriter | None = None


async def size(config: RouterConfig, shards: ShardClient) -> tuple[ShardInfo, Budgets]:
    """Warm the shards up and return what fits; raises StartupError."""
    try:
        info = await shards.info()
        # A token of output is always counted, which an encoder has no position for, and needs none.
        no_output = int(info.is_encoder and info.max_positions > 0)
        lengths = lengths_of_model(
            config.max_input_length, config.max_total_tokens, info.max_positions + no_output
        )
        max_step_tokens = config.max_batch_prefill_tokens or (
            STEP_TOKENS if info.generates else POOLED_STEP_TOKENS
        )
        if info.is_encoder:
            max_step_tokens = max(max_step_tokens, lengths.max_input_length)
        # A step has a token for each running row, so more rows than that never run.
        max_rows = min(config.max_batch_size, max_step_tokens)
        spec = _warmup_spec(config, info, lengths, max_step_tokens, max_rows)
        num_blocks = await _warm_up(shards, spec)
        # What is left for adapters is known only now.
        info = await shards.info()
        lengths = lengths_in_pool(
            lengths,
            config.max_input_length,
            config.max_total_tokens,
            pool_tokens=num_blocks * info.block_size,
        )
    except ConfigError as error:
        raise StartupError(str(error), ExitCode.BAD_CONFIG) from error
    except ShardUnavailableError as error:
        raise StartupError(f"a shard is gone: {error}", ExitCode.SHARD_UNREACHABLE) from error
    _log_memory(info, num_blocks)
    depth = max(1, min(config.plan_depth, info.max_depth))
    budgets = Budgets(lengths, num_blocks, info.block_size, max_step_tokens, max_rows, depth, spec)
    return info, budgets


def _log_memory(info: ShardInfo, num_blocks: int) -> None:
    """Say what the memory of each rank goes to; the launcher shows it as a table."""
    memory = MemoryInfo.of(info.rank_memory)
    if memory is None:
        return
    logger.info(
        "memory of %s: a KV cache of %d tokens%s",
        info.device_type,
        num_blocks * info.block_size,
        f", as many as rank {memory.fullest_rank} has room for" * (len(memory.ranks) > 1),
        extra={"fields": {"event": "memory_plan", "memory": asdict(memory)}},
    )


def _warmup_spec(
    config: RouterConfig, info: ShardInfo, lengths: Lengths, max_step_tokens: int, max_rows: int
) -> WarmupSpec:
    wanted = config.max_batch_total_tokens
    return WarmupSpec(
        max_input_length=lengths.max_input_length,
        max_total_tokens=lengths.max_total_tokens,
        max_step_tokens=max_step_tokens,
        max_rows=max_rows,
        max_blocks=0 if wanted is None else max(1, wanted // info.block_size),
        required_tokens=required_length(config.max_input_length, config.max_total_tokens),
    )


async def _warm_up(shards: ShardClient, spec: WarmupSpec) -> int:
    try:
        return await shards.warmup(spec)
    except ShardUnavailableError:
        raise
    except LoraxError as error:
        raise StartupError(f"the warm-up failed: {error}", ExitCode.OUT_OF_MEMORY) from error


def _content_format(config: RouterConfig) -> ContentFormat | None:
    choice = config.chat_template_content_format
    return None if choice == "auto" else choice


def assemble_service(
    config: RouterConfig,
    shards: ShardClient,
    language: Language,
    info: ShardInfo,
    budgets: Budgets,
    *,
    sessions: SessionSource | None = None,
) -> ServiceParts:
    """Put together all that serves requests, whichever front end brings them."""
    limits = _limits(config, info, budgets, language)
    metrics = _metrics(config, limits)
    prompts = PromptParts(
        TokenizerPool(language.tokenizer, config.validation_workers),
        ChatRenderers(
            language.chat_template,
            RenderLimits(max_chars=limits.max_input_chars),
            _content_format(config),
        ),
        AdapterTexts(shards.adapter_text, special_tokens=language.special_tokens),
        Constraints(shards.prepare_constraint, str(Path(config.tokenizer_dir, "tokenizer.json"))),
    )
    aliases = alias_book(config)
    adapters = AdapterDirectory(shards, prompts.adapter_texts, aliases=aliases)
    settings = core_settings(config, budgets, info)
    events = event_log(config, settings)
    scheduler = make_scheduler(settings) if events is None else recorded_scheduler(settings, events)
    engine = EngineLoop(shards, scheduler, sessions=sessions, adapters=adapters, observer=metrics)
    adapters.attach(engine)
    metrics.watch_engine(engine.stats, budgets.block_size, info.block_bytes)
    selections = selection_policy(config, info, aliases)
    if selections.refusal is None:
        metrics.watch_adapters(adapters.catalog, engine.adapter_capacity)
    meters = Meters(concurrent_fetches=config.tenant_concurrent_fetches)
    tokens = TenantTokens()
    validator = Validator(
        limits,
        prompts.tokenizer,
        prompts.renderers,
        selections=selections,
        abilities=Abilities.of(info),
    )
    service = InferenceService(
        engine,
        validator,
        metrics,
        max_concurrent_requests=config.max_concurrent_requests,
        adapters=adapters,
        constraints=prompts.constraints,
        outputs=outputs_by_template(
            config, language.tokenizer, language.chat_template, info.model_type
        ),
        meters=meters,
        tokens=tokens,
        tenant_limits=tenant_limits(config),
        ledger=RequestLedger(metrics, _spans(config), _model_name(config)),
    )
    registry = AdapterRegistry(config.adapter_registry)
    manager = AdapterManager(adapters, shards, meters, tokens, registry)
    models = Models(
        config.model_id, config.served_model_names, limits.max_total_tokens, selections, manager
    )
    tokenization = Tokenization(limits, prompts.tokenizer, prompts.renderers)
    return ServiceParts(
        engine,
        service,
        prompts,
        manager,
        metrics,
        selections,
        models,
        tokenization,
        events,
    )


def _limits(
    config: RouterConfig, info: ShardInfo, budgets: Budgets, language: Language
) -> RequestLimits:
    return RequestLimits(
        max_input_length=budgets.lengths.max_input_length,
        max_total_tokens=budgets.lengths.max_total_tokens,
        vocab_size=info.vocab_size,
        max_input_chars=budgets.lengths.max_input_length * chars_per_token(language.tokenizer),
        max_best_of=config.max_best_of,
        # Half of the permits: as many as those may have whose adapter is waited for.
        max_n=min(LARGEST_N, max(config.max_concurrent_requests // 2, 1)),
        max_stop_sequences=config.max_stop_sequences,
    )


def _model_name(config: RouterConfig) -> str:
    return next(iter(config.served_model_names), config.model_id)


def _metrics(config: RouterConfig, limits: RequestLimits) -> Metrics:
    return Metrics(
        model_name=_model_name(config),
        max_input_length=limits.max_input_length,
        max_total_tokens=limits.max_total_tokens,
        max_adapter_labels=config.max_adapter_labels,
    )


def _spans(config: RouterConfig) -> SpanSink | None:
    """Return what takes the spans of traced requests, where some are."""
    if config.otlp_endpoint is None:
        return None
    from lorax_telemetry.exporting import open_export

    return open_export(config.otlp_endpoint, "router")


def import_front_ends() -> None:
    """Import what ``assemble`` needs, before there is anything to put together."""
    from lorax_router.grpc_api import servicer  # noqa: F401
    from lorax_router.http_api import adapter_routes, app, calls, dialects  # noqa: F401
    from lorax_router.http_api.openai import lora_routes  # noqa: F401


def assemble(
    config: RouterConfig,
    shards: ShardClient,
    language: Language,
    info: ShardInfo,
    budgets: Budgets,
    keys: KeyStore | None = None,
    *,
    sessions: SessionSource | None = None,
) -> Parts:
    """Put all parts together, the front ends included.

    ``sessions`` are those of the shards, where others are waited for when they are lost.
    """
    keys = keys or key_store(config)
    # Here, so that the service can be used where no packages of a front end are installed.
    from lorax_router.grpc_api.servicer import PublicServicer
    from lorax_router.http_api.adapter_routes import AdapterRoutes
    from lorax_router.http_api.app import Cors, build_admin_app, build_app, build_metrics_app
    from lorax_router.http_api.calls import Calls
    from lorax_router.http_api.dialects import BODIES, EVENTS, dialect_routers, root_handler
    from lorax_router.http_api.openai.lora_routes import LoraRoutes

    parts = assemble_service(config, shards, language, info, budgets, sessions=sessions)
    adapters = AdapterRoutes(
        parts.service,
        parts.adapters,
        parts.selections,
        parts.metrics,
        max_body_bytes=config.max_body_bytes,
    )
    loras = LoraRoutes(
        parts.service,
        parts.adapters,
        parts.selections,
        parts.metrics,
        max_body_bytes=config.max_body_bytes,
    )
    facts = server_info(config, info, budgets)
    calls = Calls(
        parts.service,
        parts.models,
        parts.service.ledger,
        max_body_bytes=config.max_body_bytes,
        max_concurrent_requests=config.max_concurrent_requests,
    )
    app = build_app(
        service=parts.service,
        tokenization=parts.tokenization,
        metrics=parts.metrics,
        info=facts,
        max_body_bytes=config.max_body_bytes,
        cors=Cors.of(config),
        adapters=adapters,
        loras=loras,
        playground=_playground(config, parts, budgets),
        root=root_handler(calls, facts.task),
        dialects=dialect_routers(calls),
        bodies=BODIES,
        events=EVENTS,
        keys=keys,
    )
    admin_app = build_admin_app(adapters, loras, facts.version, keys)
    metrics_app = build_metrics_app(parts.metrics, keys)
    servicer = PublicServicer(
        parts.service, parts.adapters, parts.selections, parts.metrics, parts.tokenization, facts
    )
    return Parts(
        app, admin_app, metrics_app, keys, parts.engine, parts.service, parts.prompts, parts.adapters, parts.models,
        adapters_to_preload(config, parts.selections), servicer, parts.metrics, parts.selections, facts, parts.events,
    )  # fmt: skip


def _playground(
    config: RouterConfig, parts: ServiceParts, budgets: Budgets
) -> PlaygroundRoutes | None:
    """Return the routes of the playground, where it is wanted."""
    if not config.playground:
        return None
    from lorax_router.http_api.playground.routes import PlaygroundRoutes
    from lorax_router.service.live import LiveView, ServedFacts

    facts = ServedFacts(
        model=parts.models.base,
        max_rows=budgets.max_rows,
        block_size=budgets.block_size,
        default_source=config.default_adapter_source,
        adapter_refusal=parts.selections.refusal,
    )
    live = LiveView(
        parts.engine, facts, parts.adapters.pages.name_of, lambda: parts.metrics.num_generated
    )
    return PlaygroundRoutes(live)


def selection_policy(config: RouterConfig, info: ShardInfo, aliases: AliasBook) -> SelectionPolicy:
    """What requests may select; raises StartupError for a static adapter that cannot be one."""
    refusal = config.adapter_refusal
    if refusal is None and not info.lora_backend:
        refusal = (
            "this server serves the base model only; leave it out or set `adapter_id` to "
            f"{BASE_MODEL_ADAPTER_ID!r}"
        )
    static = None
    if config.adapter_id is not None:
        alias = aliases.find(config.adapter_id)
        own = (
            alias.selection
            if alias is not None
            else own_selection(config.adapter_source, config.adapter_id)
        )
        static = replace(own, is_default=True)
    return SelectionPolicy(
        refusal=refusal,
        default_source=config.default_adapter_source,
        static=static,
        aliases=aliases,
    )


def server_info(config: RouterConfig, info: ShardInfo, budgets: Budgets) -> ServerInfo:
    """What ``/info`` tells."""
    abilities = Abilities.of(info)
    return ServerInfo(
        model_id=config.model_id,
        model_sha=config.revision,
        model_dtype=f"torch.{info.dtype}",
        model_device_type=info.device_type,
        max_concurrent_requests=config.max_concurrent_requests,
        max_best_of=config.max_best_of,
        max_stop_sequences=config.max_stop_sequences,
        max_input_length=budgets.lengths.max_input_length,
        max_total_tokens=budgets.lengths.max_total_tokens,
        waiting_served_ratio=config.waiting_served_ratio,
        max_batch_total_tokens=budgets.pool_tokens,
        max_waiting_tokens=config.max_waiting_tokens,
        validation_workers=config.validation_workers,
        eager_prefill=config.batching == "prefill",
        version=version("lorax-py"),
        task=abilities.task,
        model_type=abilities.tei_type,
        tasks=abilities.tasks,
        labels=None if info.head is None else info.head.labels,
        model_pipeline_tag=abilities.pipeline_tag,
        memory=MemoryInfo.of(info.rank_memory),
        backends=BackendsInfo(
            attention=info.attention_backend,
            linear=info.linear_backend,
            elementwise=info.elementwise_backend,
            lora=info.lora_backend or None,
        ),
    )
