"""Options and device facts in, the configuration of every child out. Pure."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from lorax_contract.config import ConfigError, Device, RouterConfig, ShardConfig
from lorax_contract.hub import TOKEN_VARIABLES
from lorax_contract.keys import SSL_PASSWORD_VARIABLE
from lorax_launcher.backends import (
    attention_backend,
    elementwise_backend,
    linear_backend,
    lora_backend,
)
from lorax_launcher.batching import batching_of, useless_waiting
from lorax_launcher.facts import S3_SECRET_VARIABLES, DeviceFacts
from lorax_launcher.front import (
    KEY_VARIABLES,
    absolute,
    check_network,
    front_settings,
    useless_cors,
)
from lorax_launcher.modules import NamedModule, named_modules
from lorax_launcher.options import LauncherOptions, UsageError
from lorax_launcher.prepare_args import prepare_args
from lorax_launcher.quantize import resolve_quantize
from lorax_launcher.ranks import Ranks, choose_ranks

# A unix socket's path must fit in the kernel's address, its final zero byte included.
MAX_SOCKET_PATH = 107
_MERGED = (
    "an adapter is part of this server's weights (--merge-adapter-weights), others would be wrong "
    "on top of it; leave it out"
)
_KV_FRACTION = {"cpu": 0.5, "cuda": 0.9}
# Host memory for KV blocks, in GiB for each shard; vLLM's default on GPUs.
_SWAP_SPACE = {"cpu": 0.0, "cuda": 4.0}


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What ``lorax-shard prepare`` reports: where the model lies and what it is called."""

    model_id: str
    model_dir: str
    tokenizer_dir: str
    revision: str | None
    # The adapter that becomes part of the weights.
    adapter_dir: str | None = None


_FOR_EVER_S = 1e6


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Everything that is started, in the order of the fields.

    The configurations name no model yet: ``with_model`` fills it in once it is prepared.
    """

    # Arguments of `lorax-shard prepare`.
    prepare_args: tuple[str, ...]
    shards: tuple[ShardConfig, ...]
    router: RouterConfig
    # Variables that the children get beside the launcher's own environment, and those that each
    # rank gets beside them.
    environment: tuple[tuple[str, str], ...]
    shard_environments: tuple[tuple[tuple[str, str], ...], ...]
    # Variables that the router does without: it has no use for what they hold.
    withheld_from_router: tuple[str, ...]
    # Variables that prepare and shards do without: what they hold is for the front.
    withheld_from_shards: tuple[str, ...]
    # Decisions a person wants to read in the log.
    notes: tuple[str, ...]
    # Options that do not do what a person may expect of them.
    warnings: tuple[str, ...]
    # Seconds that shards and router get to become ready.
    start_timeout_s: float
    # How often shards that end are started again in a series.
    restarts: int = 0

    def with_model(self, model: PrepareReport) -> LaunchPlan:
        """Return the plan with the prepared model in every configuration."""
        shards = tuple(
            dataclasses.replace(
                shard,
                model_dir=model.model_dir,
                tokenizer_dir=model.tokenizer_dir,
                model_id=model.model_id,
                revision=model.revision,
                merge_adapter_dir=model.adapter_dir,
            )
            for shard in self.shards
        )
        router = dataclasses.replace(
            self.router,
            model_id=model.model_id,
            revision=model.revision,
            tokenizer_dir=model.tokenizer_dir,
        )
        return dataclasses.replace(self, shards=shards, router=router)


def resolve(options: LauncherOptions, facts: DeviceFacts, run_dir: str) -> LaunchPlan:
    """Turn options and facts into configurations; ``run_dir`` is the folder of this run.

    Raises UsageError when the options contradict each other or cannot be met.
    """
    _check_source(options)
    _check_adapters(options)
    check_network(options)
    device = _device(options, facts)
    ranks = choose_ranks(options, facts, device, run_dir)
    uris = [f"unix:{_socket_path(options, run_dir, rank)}" for rank in range(ranks.count)]
    quantization = resolve_quantize(options, device)
    try:
        shards = tuple(
            dataclasses.replace(
                _shard(options, facts, device, uris, ranks, rank), quantize=quantization.name
            )
            for rank in range(ranks.count)
        )
        router = _router(options, facts, uris[0], run_dir)
    except ConfigError as error:
        raise UsageError(in_flags(f"{error}.")) from error
    return LaunchPlan(
        prepare_args=prepare_args(options, facts, shards[0]),
        shards=shards,
        router=router,
        environment=_environment(options),
        shard_environments=ranks.environments,
        withheld_from_router=(
            *KEY_VARIABLES,
            *S3_SECRET_VARIABLES,
            *(() if _has_own_hub_adapters(options) else TOKEN_VARIABLES),
        ),
        withheld_from_shards=(*KEY_VARIABLES, SSL_PASSWORD_VARIABLE),
        notes=(*_notes(device, facts), *ranks.notes, *quantization.notes),
        warnings=(
            *useless_waiting(options),
            *_unequal_pools(options),
            *useless_cors(options),
            *_other_bases(options),
        ),
        start_timeout_s=options.start_timeout_s,
        restarts=options.restarts,
    )


def _check_source(options: LauncherOptions) -> None:
    if options.source == "s3" and options.model_id is None:
        raise UsageError("--source s3 needs --model-id: a place like s3://bucket/prefix.")
    if options.source == "s3" and options.revision:
        raise UsageError("--revision: prefixes of S3 have no revisions; leave it out.")
    if options.revision and options.model_id is None:
        raise UsageError("--revision needs --model-id: the embedded model has one revision only.")
    if options.revision and _inline_revision(options.model_id or ""):
        raise UsageError(
            f"--model-id {options.model_id} names a revision already; leave --revision out."
        )


def _check_adapters(options: LauncherOptions) -> None:
    for name in ("adapter_source", "default_adapter_source", "preloaded_adapter_source"):
        if getattr(options, name) == "pbase":
            raise UsageError(
                f"--{name.replace('_', '-')} pbase is refused: adapters of Predibase are not in "
                "this version; download the adapter and serve its folder with the source local."
            )
    if not options.merge_adapter_weights:
        return
    if options.adapter_id is None:
        raise UsageError(
            "--merge-adapter-weights needs --adapter-id: the adapter that becomes part of the "
            "weights."
        )
    if _modules(options):
        raise UsageError(
            "--lora-modules cannot be had with --merge-adapter-weights: on top of a merged adapter "
            "others would be wrong; leave one of the two out."
        )
    if options.preloaded_adapter_ids:
        raise UsageError(
            "--preloaded-adapter-ids cannot be had with --merge-adapter-weights: on top of a "
            "merged adapter others would be wrong; leave one of the two out."
        )


def _local_roots(options: LauncherOptions) -> list[str]:
    """Return the folders below which local adapters may lie; those named as paths here may."""
    named: list[str] = []
    if options.adapter_source == "local" and options.adapter_id is not None:
        named.append(options.adapter_id)
    if (options.preloaded_adapter_source or options.adapter_source) == "local":
        named += options.preloaded_adapter_ids
    named += [each.ref.id for each in _modules(options) if each.ref.source == "local"]
    roots = (str(Path(root).absolute()) for root in options.adapter_local_root)
    return [*roots, *(name for name in named if Path(name).is_absolute())]


def _modules(options: LauncherOptions) -> tuple[NamedModule, ...]:
    default_source = options.default_adapter_source or options.adapter_source
    return named_modules(options.lora_modules, options.lora_adapters, default_source)


def _other_bases(options: LauncherOptions) -> list[str]:
    """Name the adapters that were said to be another base's than the one that is served."""
    names = (None, options.model_id, *options.served_model_name)
    return [
        f"base_model_name {each.base_model_name} of --lora-modules {each.name} has no effect: there "
        "is one base model"
        for each in _modules(options)
        if each.base_model_name not in names
    ]


def _inline_revision(model_id: str) -> bool:
    return "@" in model_id and not Path(model_id).exists()


def _device(options: LauncherOptions, facts: DeviceFacts) -> Device:
    usable = bool(facts.gpus) and facts.torch_has_cuda
    if options.device == "cuda" and not usable:
        missing = "no GPU is visible" if not facts.gpus else "the installed torch is a CPU build"
        raise UsageError(f"--device cuda cannot be met: {missing}; use --device cpu.")
    if options.device == "cpu" or not usable:
        return "cpu"
    return "cuda"


def _admin_path(options: LauncherOptions, run_dir: str) -> str:
    path = str(Path(options.admin_uds_path or f"{run_dir}/admin").absolute())
    return _short_enough(path, "--admin-uds-path")


def _socket_path(options: LauncherOptions, run_dir: str, rank: int) -> str:
    path = f"{options.shard_uds_path or f'{run_dir}/shard'}-{rank}"
    return _short_enough(path, "--shard-uds-path")


def _short_enough(path: str, flag: str) -> str:
    if len(path.encode()) > MAX_SOCKET_PATH:
        raise UsageError(
            f"{flag}: the socket {path} has a longer path than the {MAX_SOCKET_PATH} "
            "bytes the system allows; choose a shorter one."
        )
    return path


def _kv_fraction(options: LauncherOptions, device: Device) -> float:
    ours, theirs = options.kv_memory_fraction, options.memory_wiggle_room
    if ours is not None and theirs is not None and ours != theirs:
        raise UsageError(
            "--kv-memory-fraction and --memory-wiggle-room name the same share; give one of them."
        )
    if ours is None:
        ours = theirs
    return _KV_FRACTION[device] if ours is None else ours


def _swap_bytes(options: LauncherOptions, device: Device) -> int:
    space = _SWAP_SPACE[device] if options.swap_space is None else options.swap_space
    return int(space * 2**30)


def _device_fraction(options: LauncherOptions, device: Device) -> float:
    share = options.cuda_memory_fraction
    if device == "cpu" and share < 1:
        raise UsageError(
            f"--cuda-memory-fraction {share:g} is refused: it caps a GPU, and the model is served "
            "on the CPU; lower --kv-memory-fraction instead."
        )
    return share


def _shard(
    options: LauncherOptions,
    facts: DeviceFacts,
    device: Device,
    uris: list[str],
    ranks: Ranks,
    rank: int,
) -> ShardConfig:
    limits_threads = device == "cpu" and not facts.threads_preset
    return ShardConfig(
        log_level=options.log_level,
        otlp_endpoint=options.otlp_endpoint or None,
        lifeline=True,
        model_dir="",
        model_id="",
        rank=rank,
        world_size=len(uris),
        shard_uris=uris,
        rendezvous=ranks.rendezvous,
        group_timeout_s=options.shard_timeout_s,
        start_timeout_s=options.start_timeout_s,
        ranks_on_device=ranks.per_device,
        device=device,
        dtype=options.dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        attention_backend=attention_backend(options, device),
        linear_backend=linear_backend(options),
        elementwise_backend=elementwise_backend(options),
        trust_remote_code=options.trust_remote_code,
        task=options.task,
        kv_memory_fraction=_kv_fraction(options, device),
        cuda_memory_fraction=_device_fraction(options, device),
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        swap_bytes=_swap_bytes(options, device),
        max_depth=options.plan_depth,
        speculative_tokens=options.speculative_tokens,
        speculation_max_batch_size=options.speculation_max_batch_size,
        max_input_length=options.max_input_length or 0,
        eager=options.eager,
        graph_max_rows=options.compile_max_batch_size,
        graph_max_rank=options.compile_max_rank,
        num_threads=max(1, facts.num_cores // len(uris)) if limits_threads else None,
        adapters=not options.merge_adapter_weights,
        lora_backend=lora_backend(options),
        adapter_store_dir=_store_dir(options, facts),
        adapter_store_bytes=_store_bytes(options),
        adapter_local_roots=_local_roots(options),
        adapter_s3_roots=list(options.adapter_s3_root),
        s3_endpoint=facts.s3_endpoint,
        adapter_host_bytes=int(options.adapter_host_memory_gb * 1e9),
        adapter_memory_fraction=options.adapter_memory_fraction,
        adapter_concurrency=options.adapter_concurrency,
        adapter_timeout_s=options.adapter_timeout_s,
        adapter_refresh_s=options.adapter_refresh_s,
        max_adapter_rank=options.max_adapter_rank,
        max_active_adapters=options.max_active_adapters,
        watermark_gamma=options.watermark_gamma,
        watermark_delta=options.watermark_delta,
    )


def _router(
    options: LauncherOptions, facts: DeviceFacts, shard_uri: str, run_dir: str
) -> RouterConfig:
    most = options.max_batch_total_tokens
    if most is not None and options.max_total_tokens is not None:
        _at_most("--max-total-tokens", options.max_total_tokens, "--max-batch-total-tokens", most)
    return RouterConfig(
        log_level=options.log_level,
        otlp_endpoint=options.otlp_endpoint or None,
        lifeline=True,
        model_id="",
        served_model_names=list(options.served_model_name),
        tokenizer_dir="",
        tokenizer_config_path=options.tokenizer_config_path,
        chat_template=options.chat_template,
        chat_template_content_format=options.chat_template_content_format,
        tool_call_parser=options.tool_call_parser,
        tool_parser_plugin=options.tool_parser_plugin,
        reasoning_parser=options.reasoning_parser,
        shard_uri=shard_uri,
        shard_wait_s=options.start_timeout_s,
        # For as long as the launcher tries: it ends the router when it gives up.
        shard_return_s=_FOR_EVER_S if options.restarts else 0.0,
        hostname=options.hostname,
        port=options.port,
        admin_uds=_admin_path(options, run_dir),
        admin_port=options.admin_port,
        grpc_port=options.grpc_port,
        max_concurrent_requests=options.max_concurrent_requests,
        max_best_of=options.max_best_of,
        max_stop_sequences=options.max_stop_sequences,
        max_input_length=options.max_input_length,
        max_total_tokens=options.max_total_tokens,
        max_batch_prefill_tokens=options.max_batch_prefill_tokens,
        max_batch_total_tokens=most,
        max_batch_size=options.max_batch_size,
        batching=batching_of(options),
        max_batch_kv_read=options.max_batch_kv_read,
        max_partial_prompts=options.max_partial_prompts,
        target_itl_ms=options.target_itl_ms,
        plan_depth=options.plan_depth,
        scheduling_policy=options.scheduling_policy,
        prefix_caching=options.prefix_caching,
        share_prefixes=options.share_prefixes,
        ingress_uri=options.ingress_uri,
        ingress_tls_dir=absolute(options.ingress_tls_dir),
        record_events=absolute(options.record_events),
        record_events_bytes=options.record_events_bytes,
        max_queued_requests=options.max_queued_requests,
        max_queued_tokens=options.max_queued_tokens,
        tenant_queued_requests=options.tenant_queued_requests,
        tenant_queued_tokens=options.tenant_queued_tokens,
        tenant_kv_share=options.tenant_kv_share,
        tenant_adapter_share=options.tenant_adapter_share,
        tenant_concurrent_fetches=options.tenant_concurrent_fetches,
        swap_cached_blocks=options.swap_cached_blocks,
        adapter_refusal=_MERGED if options.merge_adapter_weights else None,
        default_adapter_source=options.default_adapter_source or options.adapter_source,
        adapter_id=None if options.merge_adapter_weights else options.adapter_id,
        adapter_source=options.adapter_source,
        preloaded_adapter_ids=list(options.preloaded_adapter_ids),
        preloaded_adapter_source=options.preloaded_adapter_source or options.adapter_source,
        adapter_aliases=[f"{each.name}={each.ref}" for each in _modules(options)],
        adapter_registry=_registry(options, facts),
        max_active_adapters=options.max_active_adapters,
        adapter_cycle_time_s=options.adapter_cycle_time_s,
        max_adapter_labels=options.max_adapter_labels,
        max_body_bytes=options.max_body_bytes,
        validation_workers=options.validation_workers,
        waiting_served_ratio=options.waiting_served_ratio,
        max_waiting_tokens=options.max_waiting_tokens,
        max_connections=options.max_connections,
        http_workers=options.http_workers,
        client_timeout_s=options.client_timeout_s,
        grace_period_s=options.grace_period_s,
        step_timeout_s=options.step_timeout_s,
        **front_settings(options),
    )


def _at_most(name: str, value: int, limit_name: str, limit: int) -> None:
    if value > limit:
        raise UsageError(f"{name} {value} can never fit in {limit_name} {limit}; lower it.")


def in_flags(text: str) -> str:
    """Spell the field at the head of a ConfigError as the flag that set it."""
    field, colon, rest = text.partition(":")
    known = {each.name for each in dataclasses.fields(LauncherOptions)}
    return f"--{field.replace('_', '-')}{colon}{rest}" if field in known else text


def _store_dir(options: LauncherOptions, facts: DeviceFacts) -> str:
    return options.adapter_store_dir or f"{options.cache_dir or facts.cache_dir}/adapters"


def _registry(options: LauncherOptions, facts: DeviceFacts) -> str:
    """Return the file of what the next server is to know; a port of its own names none."""
    if options.adapter_registry is not None:
        return "" if options.adapter_registry == "none" else str(absolute(options.adapter_registry))
    if not options.port or options.merge_adapter_weights:
        return ""
    model = re.sub(r"[^A-Za-z0-9.-]+", "_", options.model_id or "default").strip("_")[-80:]
    return f"{_store_dir(options, facts)}/servers/{options.port}-{model}.sqlite3"


def _store_bytes(options: LauncherOptions) -> int:
    return max(1, int(options.adapter_store_gb * 1e9))


def _environment(options: LauncherOptions) -> tuple[tuple[str, str], ...]:
    folders = (("HF_HUB_CACHE", options.huggingface_hub_cache), ("LORAX_CACHE", options.cache_dir))
    return tuple((name, folder) for name, folder in folders if folder is not None)


def _has_own_hub_adapters(options: LauncherOptions) -> bool:
    """Whether the router loads adapters from the hub by itself, with the server's token."""
    preloaded_source = options.preloaded_adapter_source or options.adapter_source
    static = options.adapter_id is not None and not options.merge_adapter_weights
    return (
        (static and options.adapter_source == "hub")
        or (bool(options.preloaded_adapter_ids) and preloaded_source == "hub")
        or any(each.ref.source == "hub" for each in _modules(options))
    )


def _unequal_pools(options: LauncherOptions) -> list[str]:
    """Name the one of two sizes of the KV cache that does not count, if they differ."""
    blocks, most = options.num_blocks, options.max_batch_total_tokens
    if blocks is None or most is None or blocks * options.block_size == most:
        return []
    size = blocks * options.block_size
    return [
        f"--max-batch-total-tokens {most} has no effect: --num-blocks {blocks} is {size} tokens"
    ]


def _notes(device: Device, facts: DeviceFacts) -> tuple[str, ...]:
    memory = f"{facts.memory_bytes / 2**30:.1f} GiB"
    notes = [f"device {device}: {facts.num_cores} cores, {memory} memory"]
    if device == "cuda":
        notes[0] += f", {facts.gpus[0].name}"
    elif facts.gpus:
        why = "on request" if facts.torch_has_cuda else "because the installed torch has no CUDA"
        notes.append(f"{len(facts.gpus)} GPU(s) stay unused {why}")
    return tuple(notes)
