"""What a person may ask of the launcher, as one frozen value: no defaults of the machine in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorax_contract.config import Batching, ContentFormatChoice, KVCacheDtype, Task


class UsageError(ValueError):
    """The options contradict each other, or ask for something this version does not do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherOptions:
    """The parsed command line and environment; None means "not given, decide for me"."""

    model_id: str | None = None
    revision: str | None = None
    source: str = "hub"
    served_model_name: tuple[str, ...] = ()
    trust_remote_code: bool = False
    task: Task = "auto"
    tokenizer_config_path: str | None = None
    chat_template: str | None = None
    chat_template_content_format: ContentFormatChoice = "auto"
    tool_call_parser: str = "auto"
    tool_parser_plugin: str | None = None
    reasoning_parser: str = "auto"
    cache_dir: str | None = None
    huggingface_hub_cache: str | None = None

    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    attention_backend: str = "auto"
    linear_backend: str = "auto"
    elementwise_backend: str = "auto"
    eager: bool = False
    compile_max_batch_size: int = 256
    compile_max_rank: int | None = None
    sharded: bool | None = None
    num_shard: int | None = None

    adapter_id: str | None = None
    adapter_source: str = "hub"
    default_adapter_source: str | None = None
    preloaded_adapter_ids: tuple[str, ...] = ()
    preloaded_adapter_source: str | None = None
    lora_modules: tuple[str, ...] = ()
    lora_adapters: str | None = None
    merge_adapter_weights: bool = False
    max_active_adapters: int = 1024
    adapter_cycle_time_s: float = 2.0
    adapter_memory_fraction: float = 0.1
    adapter_local_root: tuple[str, ...] = ()
    adapter_s3_root: tuple[str, ...] = ()
    adapter_store_dir: str | None = None
    adapter_registry: str | None = None
    adapter_store_gb: float = 50.0
    adapter_host_memory_gb: float = 2.0
    adapter_concurrency: int = 16
    adapter_timeout_s: float = 600.0
    adapter_refresh_s: float = 300.0
    max_adapter_labels: int = 50
    max_adapter_rank: int = 512
    lora_backend: str = "auto"
    disable_custom_kernels: bool = False
    disable_sgmv: bool = False

    kv_memory_fraction: float | None = None
    memory_wiggle_room: float | None = None
    cuda_memory_fraction: float = 1.0
    block_size: int = 16
    num_blocks: int | None = None
    plan_depth: int = 2
    scheduling_policy: str = "fair"
    # None: what --eager-prefill says, else "mixed".
    batching: Batching | None = None
    eager_prefill: bool | None = None
    max_batch_kv_read: int | None = None
    max_partial_prompts: int = 1
    target_itl_ms: float | None = None
    prefix_caching: bool = True
    share_prefixes: bool = False
    ingress_uri: str | None = None
    ingress_tls_dir: str | None = None
    record_events: str | None = None
    record_events_bytes: int = 1 << 30
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    tenant_queued_requests: int | None = None
    tenant_queued_tokens: int | None = None
    tenant_kv_share: float | None = None
    tenant_adapter_share: float | None = None
    tenant_concurrent_fetches: int | None = None
    swap_space: float | None = None
    swap_cached_blocks: bool = True
    speculative_tokens: int = 0
    speculation_max_batch_size: int = 32

    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0

    max_concurrent_requests: int = 1024
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_input_length: int | None = None
    max_total_tokens: int | None = None
    max_batch_prefill_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_batch_size: int = 256
    waiting_served_ratio: float = 1.2
    max_waiting_tokens: int = 20
    max_body_bytes: int = 2 * 1024 * 1024
    validation_workers: int = 2

    hostname: str = "127.0.0.1"
    port: int = 3000
    admin_uds_path: str | None = None
    admin_port: int | None = None
    grpc_port: int | None = None
    # Secrets: never part of a repr.
    api_key: tuple[str, ...] = field(default=(), repr=False)
    admin_api_key: tuple[str, ...] = field(default=(), repr=False)
    metrics_api_key: tuple[str, ...] = field(default=(), repr=False)
    api_keys_file: str | None = None
    metrics_port: int | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    max_connections: int = 4096
    http_workers: int = 0
    client_timeout_s: float = 30.0
    playground: bool = False
    shard_uds_path: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    shard_timeout_s: float = 60.0
    grace_period_s: float = 90.0
    step_timeout_s: float = 600.0
    start_timeout_s: float = 1800.0
    restarts: int = 10
    cors_allow_origin: tuple[str, ...] = ()
    cors_allow_header: tuple[str, ...] = ()
    cors_allow_method: tuple[str, ...] = ()
    cors_expose_header: tuple[str, ...] = ()
    cors_allow_credentials: bool = False

    otlp_endpoint: str | None = None
    log_level: str = "info"
    json_output: bool = False
    download_only: bool = False
