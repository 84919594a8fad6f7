"""The command line of ``lorax-shard prepare``."""

from __future__ import annotations

from collections.abc import Sequence

from lorax_contract.config import ShardConfig
from lorax_launcher.facts import DeviceFacts
from lorax_launcher.options import LauncherOptions


def prepare_args(
    options: LauncherOptions, facts: DeviceFacts, shard: ShardConfig
) -> tuple[str, ...]:
    """Return what names the model, and what is to be made of it for such a shard."""
    args: list[str] = ["--lifeline", "--source", options.source, "--log-level", options.log_level]
    valued: Sequence[tuple[str, str | None]] = (
        ("--model-id", options.model_id),
        ("--revision", options.revision),
        ("--cache-dir", options.cache_dir),
        ("--s3-endpoint", facts.s3_endpoint),
    )
    for flag, value in valued:
        if value is not None:
            args += [flag, value]
    if options.trust_remote_code:
        args.append("--trust-remote-code")
    if shard.device == "cpu":
        args.append("--compile-kernels")
    if shard.quantize == "gguf":
        args.append("--with-blocks")
    if options.merge_adapter_weights:
        args += _merge_args(options, shard)
        if shard.world_size > 1:
            # No rank has the whole matrices that are merged.
            args += ["--merge-dtype", shard.dtype, "--merge-device", shard.device]
    return tuple(args)


def _merge_args(options: LauncherOptions, shard: ShardConfig) -> list[str]:
    """Return what names the adapter that becomes part of the weights."""
    assert options.adapter_id is not None
    args = ["--adapter-id", options.adapter_id, "--adapter-source", options.adapter_source]
    args += ["--adapter-store-dir", str(shard.adapter_store_dir)]
    args += ["--adapter-store-bytes", str(shard.adapter_store_bytes)]
    args += ["--adapter-timeout-s", str(options.adapter_timeout_s)]
    for root in shard.adapter_local_roots:
        args += ["--adapter-local-root", root]
    for root in options.adapter_s3_root:
        args += ["--adapter-s3-root", root]
    return args
