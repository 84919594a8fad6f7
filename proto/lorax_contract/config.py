"""The configuration of each child process: one frozen dataclass, one JSON document.

The launcher resolves options and device facts into these values; a child reads
its document from a file or standard input and rejects keys it does not know.
Secrets are not part of it: they travel in the environment.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, Self

from lorax_contract.otlp import endpoint_problem

Device = typing.Literal["cpu", "cuda"]
KVCacheDtype = typing.Literal["auto", "fp8_e4m3"]
Quantize = typing.Literal["none", "int8", "gguf", "bfloat16", "fp8", "int4"]
# What a model is served for; "auto": as its files show.
Task = typing.Literal["auto", "generate", "embed", "classify", "token-classify", "rerank"]
# The form of the content of messages that a chat template reads: one text, or parts as OpenAI has them.
ContentFormatChoice = typing.Literal["auto", "string", "openai"]

# Who is admitted next and who gives way: docs/scheduling.md.
SCHEDULING_POLICIES = ("fair", "fcfs", "priority", "sjf", "lorax")
# How prompts and decodes share steps: in each one, or whose turn comes first.
Batching = typing.Literal["mixed", "prefill", "decode"]
BATCHINGS: tuple[str, ...] = typing.get_args(Batching)


class ConfigError(ValueError):
    """A configuration value is missing, unknown, of the wrong type or out of bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessConfig:
    """What every child process is told."""

    # Which incarnation of the shard group this process belongs to.
    epoch: int = 1
    log_level: str = "info"
    # File descriptor that gets one JSON line when the process is ready; None: a log line only.
    ready_fd: int | None = None
    # Where spans of traced requests are sent, by OTLP; None: nothing is traced.
    otlp_endpoint: str | None = None
    # End when standard input reaches its end, which is when the launcher is gone.
    lifeline: bool = False
    # A folder with ca.pem, cert.pem and key.pem, for TCP between router and shards; None: plain.
    shard_tls_dir: str | None = None

    def __post_init__(self) -> None:
        """Check bounds."""
        _at_least(self, "epoch", 1)
        if self.log_level.lower() not in ("debug", "info", "warning", "error", "critical"):
            raise ConfigError(f"log_level: {self.log_level!r} is not a log level")
        if self.otlp_endpoint is not None and (problem := endpoint_problem(self.otlp_endpoint)):
            raise ConfigError(f"otlp_endpoint: {problem}")

    def to_json(self) -> str:
        """Return the JSON document of this configuration."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a JSON document; unknown keys, missing keys and wrong types raise ConfigError."""
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the configuration is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise ConfigError("the configuration must be one JSON object")
        return cls(**_checked(cls, document))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig(ProcessConfig):
    """One tensor-parallel rank."""

    # A folder with config.json, safetensors and tokenizer files.
    model_dir: str
    # A folder with tokenizer.json; None: model_dir.
    tokenizer_dir: str | None = None
    # The name the model is served under, and its revision (commit) if it has one.
    model_id: str
    revision: str | None = None
    rank: int = 0
    world_size: int = 1
    # The sockets of all ranks; this rank listens on entry `rank`.
    shard_uris: list[str]
    # Where the ranks find each other: tcp://host:port or file:///path; one rank needs none.
    rendezvous: str = ""
    # Seconds that ranks wait for each other in a step, and until all have loaded.
    group_timeout_s: float = 60.0
    start_timeout_s: float = 3600.0
    # How many ranks share the memory of this one's device.
    ranks_on_device: int = 1
    device: Device = "cpu"
    # A torch dtype name, or "auto": float32 on CPU, the model's own on a GPU.
    dtype: str = "auto"
    # How the weights of linears are stored: as the model has them, in int8, as in its
    # GGUF file, or rounded to bfloat16 and computed in float32.
    quantize: Quantize = "none"
    # How K and V are stored; "auto": in the dtype above.
    kv_cache_dtype: KVCacheDtype = "auto"
    attention_backend: str = "auto"
    linear_backend: str = "auto"
    # What norms, gates and rotations compute with.
    elementwise_backend: str = "auto"
    trust_remote_code: bool = False
    task: Task = "auto"
    # The same files were compared with transformers at an earlier start of the same server.
    was_probed: bool = False
    block_size: int = 16
    # Share of the whole device that the ranks on it may take together, weights included.
    cuda_memory_fraction: float = 1.0
    # Share that the KV cache may take of what weights, the largest step and adapters leave.
    kv_memory_fraction: float = 0.5
    # A fixed number of KV blocks instead of measuring; None: measure at warm-up.
    num_blocks: int | None = None
    # Host memory for KV blocks that leave the pool, in bytes; 0: none.
    swap_bytes: int = 0
    # How many steps may be queued at once.
    max_depth: int = 2
    # Longest input accepted from LoRAX's interface when a request names no `truncate`.
    max_input_length: int = 0
    # Compute every token in a forward pass of its own: slow, and independent of batch mates.
    batch_invariant: bool = False
    # Tokens of a row that are drafted and checked in one pass, and the most rows of such a step.
    speculative_tokens: int = 0
    speculation_max_batch_size: int = 32
    # On a GPU decode steps of up to so many rows are captured in graphs, those with adapters up to
    # a rank (None: all that are taken in); ``eager``: none are.
    eager: bool = False
    graph_max_rows: int = 256
    graph_max_rank: int | None = None
    num_threads: int | None = None
    # Adapters are served; False: the base model (with what is merged into it) alone.
    adapters: bool = True
    lora_backend: str = "auto"
    # An adapter's folder that becomes part of the weights while they are loaded.
    merge_adapter_dir: str | None = None
    # Where adapters' files lie, and how many bytes of them; "": adapters are not served.
    adapter_store_dir: str = ""
    adapter_store_bytes: int = 50 << 30
    # Folders below which `local` adapters may lie; none: the source is off.
    adapter_local_roots: list[str] = dataclasses.field(default_factory=list)
    # Like s3://bucket/prefix; "s3://" allows every bucket; none: the source is off.
    adapter_s3_roots: list[str] = dataclasses.field(default_factory=list)
    s3_endpoint: str | None = None
    # Parsed copies in host memory, in bytes.
    adapter_host_bytes: int = 2 << 30
    # Share that adapters on the device may take of what weights and the largest step leave.
    adapter_memory_fraction: float = 0.1
    max_adapter_rank: int = 512
    # In effect at once.
    max_active_adapters: int = 1024
    # Adapters that are fetched at the same time, and seconds for each.
    adapter_concurrency: int = 16
    adapter_timeout_s: float = 600.0
    # A name is asked for again after so many seconds; a source's "yes" to a token holds so long.
    adapter_refresh_s: float = 300.0
    # Share of the vocabulary that a watermark prefers, and what it adds to its logits.
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0

    @property
    def fetches(self) -> bool:
        """Whether this rank brings adapters: rank 0, and who is reached by TCP, which may be on a host of its own."""
        return self.rank == 0 or not self.shard_uris[self.rank].startswith("unix:")

    def __post_init__(self) -> None:
        """Check bounds."""
        ProcessConfig.__post_init__(self)
        _at_least(self, "world_size", 1)
        _at_least(self, "block_size", 1)
        _at_least(self, "max_depth", 1)
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank: {self.rank} is not within 0..{self.world_size - 1}")
        if len(self.shard_uris) != self.world_size:
            raise ConfigError("shard_uris: needs one address per rank")
        _private("shard_uris", self.shard_uris[self.rank], "shard_tls_dir", self.shard_tls_dir)
        if self.world_size > 1 and not self.rendezvous:
            raise ConfigError("rendezvous: needs a place where the ranks meet")
        if self.quantize in ("int8", "gguf", "bfloat16") and self.device != "cpu":
            raise ConfigError(f"quantize: ranks on CPUs compute in {self.quantize}")
        _at_least(self, "ranks_on_device", 1)
        _at_least(self, "swap_bytes", 0)
        _at_least(self, "speculative_tokens", 0)
        _at_least(self, "speculation_max_batch_size", 1)
        _at_least(self, "graph_max_rows", 1)
        for name in ("cuda_memory_fraction", "kv_memory_fraction"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}: must be above 0 and at most 1")
        if self.num_blocks is not None:
            _at_least(self, "num_blocks", 1)
        if not 0.0 <= self.watermark_gamma <= 1.0:
            raise ConfigError("watermark_gamma: must be from 0 to 1")
        if not 0.0 <= self.adapter_memory_fraction < 1.0:
            raise ConfigError("adapter_memory_fraction: must be at least 0 and below 1")
        if self.graph_max_rank is not None:
            _at_least(self, "graph_max_rank", 1)
        for name in (
            "adapter_store_bytes", "max_adapter_rank", "max_active_adapters", "adapter_concurrency",
        ):  # fmt: skip
            _at_least(self, name, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig(ProcessConfig):
    """The router: queue, budgets, HTTP and gRPC front ends."""

    model_id: str
    revision: str | None = None
    # What requests may call the base model, the first of which is shown; none: model_id.
    served_model_names: list[str] = dataclasses.field(default_factory=list)
    # A folder with tokenizer.json (and tokenizer_config.json for the chat template).
    tokenizer_dir: str
    tokenizer_config_path: str | None = None
    # The chat template itself, or its file; None: the model's.
    chat_template: str | None = None
    # The form of messages' contents that the template reads; `auto`: the one that shows in it.
    chat_template_content_format: ContentFormatChoice = "auto"
    # What reads tool calls and reasoning in the answers of chats.
    tool_call_parser: str = "auto"
    # `module:Class` of a parser of the operator's; None: one of ours.
    tool_parser_plugin: str | None = None
    reasoning_parser: str = "auto"
    # The address of rank 0; the others are asked from it.
    shard_uri: str
    # Seconds to wait for a shard that still loads its model; 0: it must answer at once.
    shard_wait_s: float = 0.0
    # Seconds to wait for others when the shards are lost; 0: the router ends then.
    shard_return_s: float = 0.0
    hostname: str = "127.0.0.1"
    port: int = 3000
    # Where adapters are managed: a unix socket, and a port of the loopback; None: not there.
    admin_uds: str | None = None
    admin_port: int | None = None
    # Where ingresses over several servers attach: ``unix:PATH`` or ``HOST:PORT``; None: nowhere.
    # A folder with ca.pem, cert.pem and key.pem, for TCP; None: plain.
    ingress_uri: str | None = None
    ingress_tls_dir: str | None = None
    # gRPC health and reflection; None: no gRPC listener. 0: any free port.
    grpc_port: int | None = None
    max_concurrent_requests: int = 1024
    max_best_of: int = 2
    max_stop_sequences: int = 4
    # None: min(positions of the model, 4096) - 1 and min(positions, 4096).
    max_input_length: int | None = None
    max_total_tokens: int | None = None
    # Tokens that one step may compute; None: 512, of a model that generates nothing 1024.
    max_batch_prefill_tokens: int | None = None
    # Tokens that the KV cache may hold; None: all that fit.
    max_batch_total_tokens: int | None = None
    # Requests that may run at once.
    max_batch_size: int = 256
    # How prompts and decodes share steps.
    batching: Batching = "mixed"
    # Cached tokens that the rows of a step attend to together; None: any number.
    max_batch_kv_read: int | None = None
    # Prompts longer than a step that are computed at once.
    max_partial_prompts: int = 1
    # Milliseconds that a step may take while somebody waits for the next token; None: any.
    target_itl_ms: float | None = None
    plan_depth: int = 2
    # Who is admitted next and who gives way: one of SCHEDULING_POLICIES.
    scheduling_policy: str = "fair"
    # Keep the KV of prompts and outputs for requests that begin alike; between tenants, too.
    prefix_caching: bool = True
    share_prefixes: bool = False
    # Where all that enters the scheduler is recorded, and how many bytes of it; None: nowhere.
    record_events: str | None = None
    record_events_bytes: int = 1 << 30
    # What may wait for its first step, of all tenants together and of each of whom the keys say
    # nothing else; None: no limit. Tokens are those of prompts and the most that may follow.
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    tenant_queued_requests: int | None = None
    tenant_queued_tokens: int | None = None
    # What one of them may hold while others want it; None: as much as there is.
    tenant_kv_share: float | None = None
    tenant_adapter_share: float | None = None
    tenant_concurrent_fetches: int | None = None
    # Keep cached KV blocks that the cache needs for others in the shards' host memory.
    swap_cached_blocks: bool = True
    # Why requests may not name adapters; None: they may.
    adapter_refusal: str | None = None
    # Where adapters come from whose requests name no source.
    default_adapter_source: str = "hub"
    # What requests get that name no adapter; None: the base model.
    adapter_id: str | None = None
    adapter_source: str = "hub"
    # Adapters that are there before the first request, and stay.
    preloaded_adapter_ids: list[str] = dataclasses.field(default_factory=list)
    preloaded_adapter_source: str = "hub"
    # Names of the operator's own choosing, like name=local:/folder; there from the start, too.
    adapter_aliases: list[str] = dataclasses.field(default_factory=list)
    # A file that keeps what is named, pinned and loaded by hand for the next server; "": nothing does.
    adapter_registry: str = ""
    # Adapters on the shards at once.
    max_active_adapters: int = 1024
    # How long an adapter waits, stays and drains before it is made to move.
    adapter_cycle_time_s: float = 2.0
    # Adapters that have series of their own in the metrics; the others are counted together.
    max_adapter_labels: int = 50
    validation_workers: int = 2
    # When those that wait join those that run: of the policy `lorax`, the second also of the
    # batching `decode`.
    waiting_served_ratio: float = 1.2
    max_waiting_tokens: int = 20
    # Largest request body in bytes.
    max_body_bytes: int = 2 * 1024 * 1024
    # Open HTTP connections, and seconds that their clients may take to go on.
    max_connections: int = 4096
    # Processes that speak HTTP for the one that generates; 0: that one does.
    http_workers: int = 0
    client_timeout_s: float = 30.0
    # Seconds that running requests get to finish after SIGTERM.
    grace_period_s: float = 90.0
    # Seconds without an answer after which a step counts as lost.
    step_timeout_s: float = 600.0
    # API keys as sha256 in hex: of clients, of admins, for the metrics. None at all: everybody
    # may ask. The file maps keys to tenants, and is read again when it changes.
    api_key_hashes: list[str] = dataclasses.field(default_factory=list, repr=False)
    admin_key_hashes: list[str] = dataclasses.field(default_factory=list, repr=False)
    metrics_key_hashes: list[str] = dataclasses.field(default_factory=list, repr=False)
    api_keys_file: str | None = None
    # A listener of its own for /metrics; None: there is none.
    metrics_port: int | None = None
    # TLS for HTTP and gRPC; the files are read again when they change. None: plain text.
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    # A page to try the server with, at /playground.
    playground: bool = False
    cors_allow_origin: list[str] = dataclasses.field(default_factory=list)
    cors_allow_header: list[str] = dataclasses.field(default_factory=list)
    cors_allow_method: list[str] = dataclasses.field(default_factory=list)
    cors_expose_header: list[str] = dataclasses.field(default_factory=list)
    cors_allow_credentials: bool = False

    def __post_init__(self) -> None:
        """Check bounds."""
        ProcessConfig.__post_init__(self)
        for name in (
            "max_concurrent_requests", "max_best_of", "max_batch_size", "plan_depth", "validation_workers", "max_body_bytes",
            "max_connections",
            "max_active_adapters", "max_adapter_labels", "max_partial_prompts",
        ):  # fmt: skip
            _at_least(self, name, 1)
        _private("shard_uri", self.shard_uri, "shard_tls_dir", self.shard_tls_dir)
        _private("ingress_uri", self.ingress_uri, "ingress_tls_dir", self.ingress_tls_dir)
        for name in (
            "max_batch_prefill_tokens", "max_queued_requests", "max_queued_tokens", "tenant_queued_requests",
            "tenant_queued_tokens", "tenant_concurrent_fetches",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                _at_least(self, name, 1)
        for name in ("tenant_kv_share", "tenant_adapter_share"):
            share = getattr(self, name)
            if share is not None and not 0.0 < share <= 1.0:
                raise ConfigError(f"{name}: must be above 0 and at most 1")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("ssl_keyfile: is of no use without ssl_certfile")
        if self.max_batch_kv_read is not None:
            _at_least(self, "max_batch_kv_read", 1)
        if self.target_itl_ms is not None and self.target_itl_ms <= 0:
            raise ConfigError("target_itl_ms: must be above 0")
        if self.client_timeout_s <= 0:
            raise ConfigError("client_timeout_s: must be above 0")
        for name in ("max_stop_sequences", "port", "http_workers"):
            _at_least(self, name, 0)
        total, length = self.max_total_tokens, self.max_input_length
        if total is not None and length is not None and length >= total:
            raise ConfigError(
                f"max_input_length: {length} leaves no room for output within "
                f"max_total_tokens {total}; it must be smaller"
            )


def _private(name: str, uri: str | None, tls_name: str, tls_dir: str | None) -> None:
    """Refuse an address between our processes that others can reach and nothing protects."""
    if uri is None:
        return
    host = uri.rpartition(":")[0].strip("[]")
    is_here = uri.startswith("unix:") or host in ("", "localhost", "::1") or host.startswith("127.")
    if not is_here and tls_dir is None:
        raise ConfigError(
            f"{name}: other machines can reach {uri}: set {tls_name} to a folder with ca.pem, "
            "cert.pem and key.pem, or use a unix socket or an address of the loopback"
        )


def _at_least(config: object, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise ConfigError(f"{name}: {getattr(config, name)} is too small, the least is {least}")


def _checked(cls: type, document: dict[str, Any]) -> dict[str, Any]:
    """Return the document's values after checking names and types against the dataclass."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(document.keys() - fields.keys()):
        raise ConfigError(f"unknown key in the configuration: {', '.join(unknown)}")
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in document:
            raise ConfigError(f"{name}: missing from the configuration")
    for name, value in document.items():
        if not _matches(value, hints[name]):
            raise ConfigError(f"{name}: {value!r} is not of type {hints[name]}")
    return document


def _matches(value: object, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is list:
        (item,) = typing.get_args(hint)
        return isinstance(value, list) and all(_matches(each, item) for each in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    return isinstance(value, hint)
