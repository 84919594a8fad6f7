"""The router process: connect, warm up, listen, say ready, serve, drain, end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import uvloop

from lorax_contract import logs
from lorax_contract.config import ConfigError, RouterConfig
from lorax_contract.errors import LoraxError, ShardError, StartupError
from lorax_contract.exit_codes import ExitCode, hint
from lorax_contract.process import (
    announce_ready,
    importing,
    spare_garbage_collector,
    watch_lifeline,
)
from lorax_contract.start_clock import StartClock
from lorax_contract.step import ShardInfo
from lorax_proto.mutual_tls import MutualTls
from lorax_router.adapter_setup import bring_back, preload, restore_names
from lorax_router.core.ports import ShardClient, ShardSession
from lorax_router.core_setup import Budgets
from lorax_router.grpc_api.limits import CallLimits
from lorax_router.grpc_api.server import GrpcServer
from lorax_router.listening import (
    HttpServers,
    Listeners,
    granted_connections,
    listen_for_ingresses,
    open_listeners,
    port_error,
)
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.service.keys.configured import key_store
from lorax_router.service.keys.store import KeyStore
from lorax_router.service.prompts.language import load_language
from lorax_router.shards.connecting import connect, next_session
from lorax_router.shards.group import ShardGroup
from lorax_router.shards.grpc_client import CallTimeouts
from lorax_router.shards.sessions import ShardSessions
from lorax_router.startup import (
    Parts,
    assemble,
    import_front_ends,
    size,
)
from lorax_router.tls import TlsIdentity

logger = logging.getLogger("lorax_router")

Result = TypeVar("Result")

# Seconds that open gRPC calls get when the router ends: their answers are written by then, and
# watches of the health never end.
_GRPC_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class FrontSecrets:
    """Keys and certificate, read before anything expensive: what is wrong is known at once."""

    keys: KeyStore
    tls: TlsIdentity | None

    @classmethod
    def of(cls, config: RouterConfig) -> FrontSecrets:
        """Read what a configuration names; raises StartupError, which tells no secret."""
        try:
            tls = TlsIdentity.of(config)
            if tls is not None and tls.has_password and config.grpc_port is not None:
                raise ConfigError(
                    "ssl_keyfile: gRPC cannot read a key that has a password; give it one without, "
                    "or leave gRPC out"
                )
        except ConfigError as error:
            raise StartupError(str(error), ExitCode.BAD_CONFIG) from error
        return cls(key_store(config), tls)


class Stopped(Exception):
    """The router was told to stop before it was ready."""


class StopSignal:
    """The reasons to stop: a signal, or an engine that ended. A second signal ends at once."""

    def __init__(self) -> None:
        self.exit_code = ExitCode.OK
        self._stopping = asyncio.Event()

    def watch_signals(self) -> None:
        """Stop in good order on SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def stop(self, exit_code: ExitCode) -> None:
        """Begin to stop; the first reason counts."""
        if not self._stopping.is_set():
            self.exit_code = exit_code
            self._stopping.set()

    async def wait(self) -> None:
        """Return when there is a reason to stop."""
        await self._stopping.wait()

    async def unless_stopped(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do ``work``; a reason to stop cancels it and raises Stopped."""
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(self._raise_when_stopped())
                try:
                    return await work
                finally:
                    watcher.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _raise_when_stopped(self) -> None:
        await self.wait()
        raise Stopped

    def _on_signal(self, number: int) -> None:
        if self._stopping.is_set():
            logger.warning("%s again: ending at once", signal.Signals(number).name)
            leave(ExitCode.INTERRUPTED)
        self.stop(ExitCode.OK)


def run(config_text: str | bytes, clock: StartClock | None = None) -> ExitCode:
    """Serve by a configuration document and return the exit code.

    The ``clock`` has been told what came before.
    """
    try:
        config = RouterConfig.from_json(config_text)
    except ConfigError as error:
        logs.configure()
        return _explained(StartupError(str(error), ExitCode.BAD_CONFIG))
    logs.configure(config.log_level, bound={"process": "router"})
    if config.lifeline:
        watch_lifeline(lambda: leave(ExitCode.PARENT_GONE))
    try:
        # Engine loop, HTTP and gRPC share the one event loop.
        front = FrontSecrets.of(config)
        with (
            open_listeners(config) as listeners,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            return runner.run(serve(config, listeners, front, clock or StartClock()))
    except StartupError as error:
        return _explained(error)
    except Stopped:
        logger.info("stopped while starting")
        return ExitCode.INTERRUPTED
    except Exception:
        logger.exception("the router ends by an error of its own")
        return ExitCode.INTERNAL


def leave(exit_code: ExitCode) -> None:
    """End the process at once, without waiting for threads or connections."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(int(exit_code))


async def serve(
    config: RouterConfig, listeners: Listeners, front: FrontSecrets, clock: StartClock
) -> ExitCode:
    """Start all parts, serve until there is a reason to stop, then drain."""
    stopper = StopSignal()
    stopper.watch_signals()
    language = load_language(config)
    clock.ended("tokenizer, chat template")
    with importing():
        # While the shards load, not behind them.
        import_front_ends()
    clock.ended("front ends")
    group = await stopper.unless_stopped(_connect(config))
    shards: ShardClient = group
    clock.ended("waiting for the shards")
    try:
        info, budgets = await stopper.unless_stopped(size(config, shards))
        clock.ended("warm-up of the shards")
        sessions = _sessions(config, group, info, budgets)
        if sessions is not None:
            shards = sessions
            sessions.watch()
        parts = assemble(config, shards, language, info, budgets, front.keys, sessions=sessions)
        try:
            await _serve_parts(config, listeners, parts, stopper, front.tls, clock)
        except Stopped:
            # Not by a signal, but because the shards failed meanwhile.
            if stopper.exit_code is not ExitCode.OK:
                return stopper.exit_code
            raise
        finally:
            await asyncio.to_thread(parts.service.ledger.close)
            await parts.prompts.close()
            parts.adapters.registry.close()
            if parts.events is not None:
                parts.events.close()
    finally:
        await shards.close()
    return stopper.exit_code


async def _connect(config: RouterConfig) -> ShardGroup:
    try:
        tls = MutualTls.read(config.shard_tls_dir)
        group = await connect(config.shard_uri, _timeouts(config), tls, wait_s=config.shard_wait_s)
        info = await group.info()
        if info.num_blocks or info.epoch < config.epoch:
            epoch = max(config.epoch, info.epoch + 1)
            logger.warning("the shards served another router; this one takes them over")
            await group.take_over(epoch)
        return group
    except LoraxError as error:
        raise StartupError(
            f"no shard answers at {config.shard_uri}: {error}", ExitCode.SHARD_UNREACHABLE
        ) from error


def _timeouts(config: RouterConfig) -> CallTimeouts:
    return CallTimeouts(step_s=config.step_timeout_s)


def _sessions(
    config: RouterConfig, group: ShardGroup, info: ShardInfo, budgets: Budgets
) -> ShardSessions | None:
    """Return what goes on with other shards when those are lost, if others are waited for."""
    if config.shard_return_s == 0:
        return None
    following = partial(
        next_session,
        config.shard_uri,
        _timeouts(config),
        MutualTls.read(config.shard_tls_dir),
        budgets.warmup,
        wait_s=config.shard_return_s,
    )
    return ShardSessions(ShardSession(group, info, budgets.num_blocks), following)


async def _serve_parts(
    config: RouterConfig,
    listeners: Listeners,
    parts: Parts,
    stopper: StopSignal,
    tls: TlsIdentity | None,
    clock: StartClock,
) -> None:
    engine = asyncio.ensure_future(_run_engine(parts.engine, stopper))
    parts.prompts.renderers.start()
    try:
        # Nobody can ask before all that was to be there is there.
        restore_names(parts.adapters.registry, parts.selections.aliases)
        await stopper.unless_stopped(preload(parts.adapters, parts.preloads))
        clock.ended("parts put together, adapters loaded")
        await _serve_clients(config, listeners, parts, stopper, engine, tls, clock)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)


async def _serve_clients(
    config: RouterConfig,
    listeners: Listeners,
    parts: Parts,
    stopper: StopSignal,
    engine: asyncio.Future[None],
    tls: TlsIdentity | None,
    clock: StartClock,
) -> None:
    grpc_server = await _start_grpc(config, parts, tls)
    http = HttpServers(config, parts, listeners, tls)
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(http.run())
        followers = [parts.keys.follow(), bring_back(parts.adapters)]
        if tls is not None:
            followers.append(tls.follow())
        if grpc_server is not None:
            followers.append(grpc_server.follow_health())
        following = [group.create_task(each) for each in followers]
        await http.wait_started()
        ingresses = await listen_for_ingresses(config, parts)
        spare_garbage_collector()
        clock.ended("listening")
        ports = listeners.ports()
        if grpc_server is not None:
            ports["grpc_port"] = grpc_server.port
        _say_ready(config, listeners, {"ports": ports, "tasks": parts.info.tasks}, clock)
        await stopper.wait()
        if grpc_server is not None:
            grpc_server.stop_admitting()
        await _drain(config, parts)
        # What still runs ends with an error now, which its response then tells.
        engine.cancel()
        parts.service.end_resolving()
        http.stop()
        if ingresses is not None:
            await ingresses.close()
        await serving
        for task in following:
            task.cancel()
        if grpc_server is not None:
            await grpc_server.stop(_GRPC_GRACE_S)


async def _run_engine(engine: EngineLoop, stopper: StopSignal) -> None:
    """Run the engine loop; if it ends by itself, so does the router."""
    try:
        await engine.run()
    except ShardError as error:
        logger.error("the shards failed: %s", error)
        stopper.stop(ExitCode.SHARD_UNREACHABLE)
    except Exception:
        logger.exception("the engine loop ended by an error of its own")
        stopper.stop(ExitCode.INTERNAL)


async def _start_grpc(
    config: RouterConfig, parts: Parts, tls: TlsIdentity | None
) -> GrpcServer | None:
    if config.grpc_port is None:
        return None
    limits = CallLimits(
        max_connections=granted_connections(config),
        max_calls=config.max_connections,
        max_message_bytes=config.max_body_bytes,
        client_timeout_s=config.client_timeout_s,
    )
    server = GrpcServer(parts.servicer, limits, keys=parts.keys, tls=tls)
    try:
        port = server.bind(config.hostname, config.grpc_port)
    except OSError as error:
        raise port_error(config.hostname, config.grpc_port, error) from error
    await server.start()
    logger.info("gRPC on port %d", port, extra={"fields": {"port": port}})
    return server


def _say_ready(
    config: RouterConfig, listeners: Listeners, told: Mapping[str, Any], clock: StartClock
) -> None:
    url, admin = listeners.url, listeners.admin_addresses()
    fields = {"event": "ready", "url": url, "admin": admin, "model_id": config.model_id}
    if listeners.metrics_url is not None:
        fields["metrics"] = listeners.metrics_url
    logger.info("ready on %s", url, extra={"fields": fields})
    if config.playground:
        logger.info("the playground is at %s/playground", url)
    own = {"url": url, "admin": admin, "metrics": listeners.metrics_url, "pid": os.getpid()}
    announce_ready(config.ready_fd, {**own, **told, "parts": clock.parts})


async def _drain(config: RouterConfig, parts: Parts) -> None:
    logger.info("stopping: finishing what runs, admitting nothing new")
    parts.service.stop_admitting()
    parts.engine.expect_no_shards()
    if not parts.engine.has_shards:
        logger.warning("there are no shards to finish it; ending all")
        return
    try:
        async with asyncio.timeout(config.grace_period_s):
            await parts.service.wait_idle()
    except TimeoutError:
        logger.warning("the grace period of %g s is over; ending the rest", config.grace_period_s)


def _explained(error: StartupError) -> ExitCode:
    fields = {"exit_code": int(error.exit_code), "hint": hint(error.exit_code)}
    logger.error("%s", error, extra={"fields": fields})
    return error.exit_code
