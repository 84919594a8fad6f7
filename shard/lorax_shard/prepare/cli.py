"""``lorax-shard prepare``: fetch and convert the model before any shard starts.

With ``--adapter-id`` the adapter that is merged into the weights is fetched too.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lorax_contract import logs
from lorax_contract.cache import default_cache_dir
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode, hint
from lorax_contract.process import end_process_group, watch_lifeline
from lorax_shard.fetching.sources.environment import source_settings
from lorax_shard.prepare import kernels
from lorax_shard.prepare.adapter import MergedAdapter, fetch_adapter
from lorax_shard.prepare.kernels import WorkBeside
from lorax_shard.prepare.merged import merged_folder
from lorax_shard.prepare.prepare import (
    PreparedModel,
    Progress,
    ProgressEvent,
    prepare,
)

logger = logging.getLogger("lorax_shard.prepare")

_INTERVAL_S = 0.5


@click.command("prepare")
@click.option("--model-id", help="Folder, .gguf file or hub id; without it the embedded default.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--source", default="hub", show_default=True, help="'hub', 'local' or 's3'.")
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where converted models are kept; default $LORAX_CACHE or ~/.cache/lorax-py.",
)
@click.option("--trust-remote-code", is_flag=True, help="Allow the model's own Python code.")
@click.option("--compile-kernels", is_flag=True, help="Compile kernels of a CPU meanwhile.")
@click.option("--with-blocks", is_flag=True, help="Keep the blocks of a GGUF file too.")
@click.option("--adapter-id", help="The adapter that becomes part of the weights.")
@click.option("--adapter-source", default="hub", show_default=True, help="'hub', 'local' or 's3'.")
@click.option("--adapter-local-root", multiple=True, help="Where local adapters may lie.")
@click.option("--adapter-s3-root", multiple=True, help="Like s3://bucket/prefix.")
@click.option("--s3-endpoint", help="Where S3 is, if not at Amazon's.")
@click.option("--adapter-store-dir", type=click.Path(path_type=Path, file_okay=False))
@click.option("--adapter-store-bytes", type=int, default=50 << 30, show_default=True)
@click.option("--adapter-timeout-s", type=float, default=600.0, show_default=True)
@click.option("--merge-dtype", help="Merge the adapter here, in this dtype: for several shards.")
@click.option("--merge-device", default="cpu", help="What the shards compute on.")
@click.option(
    "--result-fd", type=int, help="File descriptor that gets the result as one JSON line."
)
@click.option("--log-level", default="info", show_default=True)
@click.option("--lifeline", is_flag=True, help="End when standard input reaches its end.")
def prepare_command(
    model_id: str | None,
    revision: str | None,
    source: str,
    s3_endpoint: str | None,
    cache_dir: Path | None,
    trust_remote_code: bool,
    compile_kernels: bool,
    with_blocks: bool,
    result_fd: int | None,
    log_level: str,
    lifeline: bool,
    merge_dtype: str | None,
    merge_device: str,
    **adapter: Any,
) -> None:
    """Make the model a local folder of safetensors and tokenizer files."""
    logs.configure(log_level)
    if lifeline:
        watch_lifeline(end_process_group)
    _quiet_libraries()
    cache_dir = cache_dir or default_cache_dir()
    beside = WorkBeside(kernels.compile_kernels)
    report = rate_limited(_log_progress, time.monotonic)

    def progress(event: ProgressEvent) -> None:
        # There is something to be made: a model that is there already would wait for a compiler.
        if compile_kernels:
            beside.begin()
        report(event)

    try:
        prepared = prepare(
            model_id,
            revision=revision,
            source=source,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            progress=progress,
            s3_endpoint=s3_endpoint,
            with_blocks=with_blocks,
        )
        if adapter["adapter_id"] is not None:
            folder = fetch_adapter(_merged_adapter(cache_dir, s3_endpoint, **adapter), report)
            prepared = dataclasses.replace(prepared, adapter_dir=folder)
            if merge_dtype is not None:
                merged = merged_folder(
                    prepared.model_dir,
                    folder,
                    dtype=merge_dtype,
                    device=merge_device,
                    trust_remote_code=trust_remote_code,
                    cache_dir=cache_dir,
                    progress=report,
                )
                prepared = dataclasses.replace(prepared, model_dir=merged, adapter_dir=None)
    except StartupError as error:
        fields = {"exit_code": int(error.exit_code), "hint": hint(error.exit_code)}
        logger.error("%s", error, extra={"fields": fields})
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.INTERRUPTED))
    except Exception:
        logger.exception("preparing the model failed")
        sys.exit(int(ExitCode.INTERNAL))
    beside.wait()
    _deliver(prepared, result_fd)


def _merged_adapter(
    cache_dir: Path,
    s3_endpoint: str | None,
    *,
    adapter_id: str,
    adapter_source: str,
    adapter_local_root: tuple[str, ...],
    adapter_s3_root: tuple[str, ...],
    adapter_store_dir: Path | None,
    adapter_store_bytes: int,
    adapter_timeout_s: float,
) -> MergedAdapter:
    return MergedAdapter(
        adapter_id=adapter_id,
        source=adapter_source,
        sources=source_settings(adapter_local_root, adapter_s3_root, s3_endpoint),
        store_dir=(adapter_store_dir or cache_dir / "adapters").expanduser().absolute(),
        store_bytes=adapter_store_bytes,
        timeout_s=adapter_timeout_s,
    )


def rate_limited(report: Progress, clock: Callable[[], float]) -> Progress:
    """Pass on at most two events a second for each task, and always the first and the last."""
    last: dict[str, float] = {}

    def limited(event: ProgressEvent) -> None:
        now = clock()
        due = event.task not in last or now - last[event.task] >= _INTERVAL_S
        if due or event.done == event.total:
            last[event.task] = now
            report(event)

    return limited


def _log_progress(event: ProgressEvent) -> None:
    of_total = f" of {event.total}" if event.total is not None else ""
    fields = {
        "event": "progress",
        "task": event.task,
        "done": event.done,
        "total": event.total,
        "unit": event.unit,
    }
    message = f"{event.task}: {event.done}{of_total} {event.unit}"
    logger.info("%s", message, extra={"fields": fields})


def _deliver(prepared: PreparedModel, result_fd: int | None) -> None:
    logger.info(
        "%s is ready in %s",
        prepared.model_id,
        prepared.model_dir,
        extra={"fields": {"event": "prepared", "revision": prepared.revision}},
    )
    if result_fd is not None:
        with os.fdopen(result_fd, "w") as pipe:
            pipe.write(prepared.to_json() + "\n")


def _quiet_libraries() -> None:
    """Keep libraries from drawing on the terminal and from logging each request."""
    # TQDM_DISABLE is read when tqdm is first imported: some bars heed nothing else.
    for name in ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    for name in ("httpx", "httpx2", "httpcore", "httpcore2", "filelock", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    prepare_command()
