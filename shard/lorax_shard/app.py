"""The shard process: load, listen, say ready, serve until told to stop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lorax_contract import logs
from lorax_contract.config import ConfigError, ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode, hint
from lorax_contract.process import (
    announce_ready,
    importing,
    says_out_of_memory,
    spare_garbage_collector,
    watch_lifeline,
)
from lorax_contract.start_clock import StartClock
from lorax_contract.tracing import SpanSink
from lorax_shard import ahead
from lorax_shard.adapters.host_memory import keep_between_steps, use_one_arena
from lorax_shard.cache import cpu_identity
from lorax_shard.huge_pages import release_ahead
from lorax_shard.kernel_caches import bound_kernel_caches
from lorax_shard.rpc.address import clear_stale

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lorax_shard.adapters.rank_adapters import RankAdapters
    from lorax_shard.engine.drafter import Drafter
    from lorax_shard.engine.engine import Engine
    from lorax_shard.engine.remembered_peak import RememberedPeak
    from lorax_shard.model.interface import PagedModel
    from lorax_shard.parallel.group import RankGroup

logger = logging.getLogger("lorax_shard")

# What of a configuration is another at each start, and changes nothing that is computed.
_OF_ONE_START = (
    "epoch", "ready_fd", "lifeline", "log_level", "otlp_endpoint", "shard_uris", "rendezvous", "was_probed",
    "shard_tls_dir",
    # What was chosen is told beside the options.
    "elementwise_backend",
)  # fmt: skip
# Seconds that calls under way get to finish, and that the engine's thread gets after them.
_GRACE_S = 10.0
_WORKER_GRACE_S = 5.0
# After the ranks lost each other, or the device broke: calls have their answers already.
_BROKEN_GRACE_S = 0.5
_NO_MEMORY = "there is too little memory; free some, or raise the limit of this process"


class Stopper:
    """Collects the reasons to stop, before and while the event loop runs."""

    def __init__(self) -> None:
        self.exit_code = ExitCode.OK
        self._notify: Callable[[], None] | None = None
        # Reentrant: a signal handler may interrupt its owner.
        self._lock = threading.RLock()

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Stop in good order; before the shard serves there is nothing to put in order."""
        if not self._stop(ExitCode.OK):
            logger.info("stopped by %s while starting", signal.Signals(number).name)
            leave(ExitCode.INTERRUPTED)

    def on_launcher_gone(self) -> None:
        """Stop because nobody watches any more."""
        if not self._stop(ExitCode.PARENT_GONE):
            leave(ExitCode.PARENT_GONE)

    def on_broken(self, error: Exception) -> None:
        """Stop because nothing can be computed any more, here or by the ranks together."""
        from lorax_shard.engine.self_test import DeviceBrokenError

        code, event = ExitCode.RANKS_APART, "group_broken"
        if isinstance(error, DeviceBrokenError):
            code, event = ExitCode.DEVICE_BROKEN, "device_broken"
        logger.error("%s", error, extra={"fields": {"exit_code": int(code), "event": event}})
        self._stop(code)

    def attach(self, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
        """From now on a reason to stop sets ``stop`` in the loop."""

        def notify() -> None:
            loop.call_soon_threadsafe(stop.set)

        with self._lock:
            self._notify = notify

    def _stop(self, exit_code: ExitCode) -> bool:
        with self._lock:
            if self._notify is None:
                return False
            self.exit_code = exit_code
            self._notify()
            return True


def run(config_text: str | bytes) -> ExitCode:
    """Serve by a configuration document and return the exit code."""
    try:
        config = ShardConfig.from_json(config_text)
    except ConfigError as error:
        logs.configure()
        return _explained(StartupError(str(error), ExitCode.BAD_CONFIG))
    logs.configure(config.log_level, bound={"process": "shard", "rank": config.rank})
    clock = StartClock()
    ahead.let_waiting_threads_sleep()
    use_one_arena()
    bound_kernel_caches()
    stopper = Stopper()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stopper.on_signal)
    if config.lifeline:
        watch_lifeline(stopper.on_launcher_gone)
    try:
        clear_stale(config.shard_uris[config.rank])
        if config.shard_tls_dir is not None:
            from lorax_proto.mutual_tls import MutualTls

            # What is wrong with it is said before the model is loaded.
            MutualTls.read(config.shard_tls_dir)
        return asyncio.run(serve(config, load_parts(config, clock), stopper, clock))
    except StartupError as error:
        return _explained(error)
    except Exception as error:
        if isinstance(error, MemoryError) or says_out_of_memory(str(error)):
            return _explained(StartupError(f"{_NO_MEMORY}: {error}", ExitCode.OUT_OF_MEMORY))
        logger.exception("the shard ends by an error of its own")
        return ExitCode.INTERNAL


def leave(exit_code: ExitCode) -> None:
    """End the process at once, without waiting for threads that may hang."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(int(exit_code))


@dataclass(frozen=True, slots=True)
class ShardParts:
    """What was loaded; ``make_rank_adapters`` makes the adapters' part in the event loop."""

    engine: Engine
    make_rank_adapters: Callable[[], RankAdapters] | None = None


def load_parts(config: ShardConfig, clock: StartClock | None = None) -> ShardParts:
    """Load model and tokenizer; StartupError says what is wrong with them."""
    clock = clock or StartClock()
    tokenizer = _load_tokenizer(Path(config.tokenizer_dir or config.model_dir))
    clock.ended("tokenizer")
    ahead.begin(config)
    with importing():
        import torch

        from lorax_shard.adapters import setup
        from lorax_shard.constraints.setup import constraints_maker
        from lorax_shard.engine.engine import Engine
        from lorax_shard.engine.graph_limits import GraphLimits
        from lorax_shard.engine.memory import PoolSettings
        from lorax_shard.model.dense import Projection
        from lorax_shard.model.loader import load_paged_model
        from lorax_shard.rpc import queue, server  # noqa: F401 - what serves is there when it is needed
        from lorax_shard.rpc.rank_zero import rank_zero_of
        from lorax_shard.sampling.watermark import Watermark
        from lorax_shard.threads import release_team
    clock.ended("imports")

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    serves = bool(
        config.adapters and config.adapter_store_dir and config.adapter_memory_fraction > 0
    )
    # Before the model is loaded: whoever has to be told of it is told at once.
    store = setup.make_store(config) if serves else None
    group = _meet(config)
    if store is not None or group is not None:
        clock.ended("adapter store, ranks")
    model = load_paged_model(config, group, clock)
    release_ahead()
    # The probe has compared the model over a cache that rounds nothing.
    model.store_kv_as(config.kv_cache_dtype)
    model.warm_up(config.block_size)
    clock.ended("kernels")
    release_team()
    if model.is_encoder and config.device == "cpu":
        keep_between_steps()
    pool = PoolSettings(
        block_size=config.block_size,
        memory_fraction=config.kv_memory_fraction,
        num_blocks=config.num_blocks,
        adapter_fraction=config.adapter_memory_fraction if serves else 0.0,
        device_fraction=config.cuda_memory_fraction,
        ranks_on_device=config.ranks_on_device,
        max_adapter_rank=config.max_adapter_rank if serves else 0,
        swap_bytes=config.swap_bytes,
    )
    make_engine = partial(
        Engine,
        model,
        tokenizer,
        pool,
        batch_invariant=config.batch_invariant,
        group=group,
        drafter=_drafter(config),
        watermark=Watermark(config.watermark_gamma, config.watermark_delta),
        make_constraints=None
        if not model.generates
        else constraints_maker(tokenizer, model.vocab_size, model.eos_token_ids),
        graphs=GraphLimits.of(config, pool.max_adapter_rank),
        remembered=_remembered_peak(config, model),
        projection=Projection.of(Path(config.model_dir), model.device),
    )
    if store is None:
        return ShardParts(make_engine())
    base, lora = model.base, model.lora
    assert base is not None
    assert lora is not None
    host = setup.make_host_cache(config, store)
    base = replace(base, keeps_stored=lora.keeps_stored)
    lane = setup.make_prepare_lane(config, host, lora, model.dtype)
    return ShardParts(
        make_engine(adapters=lane),
        partial(setup.make_rank_adapters, config, store, host, lane, base, rank_zero_of(config)),
    )


def _remembered_peak(config: ShardConfig, model: PagedModel) -> RememberedPeak | None:
    """Return what knows how much the largest step takes.

    None: where a device's libraries take memory at their first step, where ranks would have to
    agree on what each remembers, and where a model brings code that nobody knows.
    """
    if config.device != "cpu" or config.world_size > 1 or config.trust_remote_code:
        return None
    import numpy as np
    import torch
    import transformers

    from lorax_shard.engine.remembered_peak import RememberedPeak

    options = json.loads(config.to_json())
    for name in _OF_ONE_START:
        del options[name]
    backends = (
        model.attention_backend, model.linear_backend, model.elementwise_backend,
        model.lora_backend,
    )  # fmt: skip
    versions = (torch.__version__, transformers.__version__, np.__version__, sys.version)
    model_config = Path(config.model_dir, "config.json").read_text(encoding="utf-8")
    return RememberedPeak([
        options, model_config, model.weight_bytes, backends, versions, cpu_identity(),
        torch.get_num_threads(),
    ])  # fmt: skip


def _drafter(config: ShardConfig) -> Drafter | None:
    """Return what drafts tokens, where that is asked for."""
    from lorax_shard.engine.drafter import Drafter, DraftSettings

    if not config.speculative_tokens:
        return None
    return Drafter(
        DraftSettings(
            max_tokens=config.speculative_tokens,
            max_rows=config.speculation_max_batch_size,
            max_depth=config.max_depth,
        )
    )


def _meet(config: ShardConfig) -> RankGroup | None:
    """Wait for the other ranks; None where there are none."""
    if config.world_size == 1:
        return None
    import torch

    from lorax_shard.parallel.group import TorchGroup

    return TorchGroup(
        config.rank,
        config.world_size,
        config.rendezvous,
        torch.device(config.device),
        timeout_s=config.group_timeout_s,
        meeting_s=config.start_timeout_s,
        shares_device=config.ranks_on_device > 1,
    )


def _load_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not folder.is_dir():
        raise StartupError(f"the folder {folder} does not exist", ExitCode.MODEL_NOT_FOUND)
    if not path.is_file():
        raise StartupError(
            f"{path} is missing; prepare the model with lorax-shard prepare",
            ExitCode.MODEL_NOT_FOUND,
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise StartupError(f"{path} cannot be read: {error}", ExitCode.MODEL_CORRUPT) from error


async def serve(
    config: ShardConfig, parts: ShardParts, stopper: Stopper, clock: StartClock | None = None
) -> ExitCode:
    """Listen, announce that the shard is ready, and serve until stopped."""
    from lorax_shard.rpc.queue import CommandQueue
    from lorax_shard.rpc.server import ShardServer

    stop = asyncio.Event()
    stopper.attach(asyncio.get_running_loop(), stop)
    commands = CommandQueue(config.epoch, on_broken=stopper.on_broken)
    rank_adapters = parts.make_rank_adapters() if parts.make_rank_adapters is not None else None
    spans = _spans(config)
    server = ShardServer(config, parts.engine, commands, rank_adapters, spans)
    if parts.engine.constraints is not None:
        parts.engine.constraints.warm_up()
    spare_garbage_collector()
    await server.start()
    logger.info("ready on %s", server.uri, extra={"fields": {"event": "ready", "uri": server.uri}})
    told: dict[str, Any] = {"uri": server.uri, "pid": os.getpid(), "rank": config.rank}
    # As the probe left it.
    told["elementwise"] = parts.engine.model.elementwise_backend
    if clock is not None:
        clock.ended("engine, listening")
        told["parts"] = clock.parts
    announce_ready(config.ready_fd, told)
    if rank_adapters is not None:
        rank_adapters.start()
    await stop.wait()
    logger.info("stopping")
    is_broken = stopper.exit_code in (ExitCode.RANKS_APART, ExitCode.DEVICE_BROKEN)
    await server.stop(_BROKEN_GRACE_S if is_broken else _GRACE_S)
    if rank_adapters is not None:
        await rank_adapters.close()
    if spans is not None:
        await asyncio.to_thread(spans.close)
    if not await commands.close(_WORKER_GRACE_S):
        logger.warning("a step is still running; it is left behind")
        leave(stopper.exit_code)
    if is_broken:
        # Threads of the collectives may wait for the others for ever, or for the device.
        leave(stopper.exit_code)
    return stopper.exit_code


def _spans(config: ShardConfig) -> SpanSink | None:
    """Return what takes the spans of traced requests, where some are."""
    if config.otlp_endpoint is None:
        return None
    from lorax_telemetry.exporting import open_export

    return open_export(config.otlp_endpoint, "shard", rank=config.rank)


def _explained(error: StartupError) -> ExitCode:
    fields = {"exit_code": int(error.exit_code), "hint": hint(error.exit_code)}
    logger.error("%s", error, extra={"fields": fields})
    return error.exit_code
