"""Where the router listens over HTTP: for clients, and apart from them for its operator."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorax_contract.config import RouterConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_proto.mutual_tls import context_in, context_of_server
from lorax_router.http_api.admin import AdminGuard
from lorax_router.http_api.connection import ConnectionLimits
from lorax_router.http_api.listeners import bind, bind_unix, url_of
from lorax_router.http_api.server import HttpServer
from lorax_router.tls import TlsIdentity

if TYPE_CHECKING:
    from lorax_router.fronts.attached import AttachedFronts
    from lorax_router.fronts.desk import CoreParts
    from lorax_router.fronts.supervisor import Fronts
    from lorax_router.startup import Parts

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# Connections that may wait to be accepted.
_BACKLOG = 2048
# Open files that are no connections of clients.
_OWN_FILES = 64
_MAX_ADMINS = 64


@dataclass(frozen=True, slots=True)
class Listeners:
    """Sockets that are bound and do not listen yet; None: there is none of that kind."""

    clients: socket.socket
    admin_unix: socket.socket | None = None
    admin_port: socket.socket | None = None
    metrics: socket.socket | None = None
    # Whether clients speak TLS.
    has_tls: bool = False

    @property
    def url(self) -> str:
        """Where clients find the server."""
        return self._url_of(self.clients)

    @property
    def metrics_url(self) -> str | None:
        """Where the metrics are alone."""
        return None if self.metrics is None else f"{self._url_of(self.metrics)}/metrics"

    def _url_of(self, listener: socket.socket) -> str:
        return url_of(listener, "https" if self.has_tls else "http")

    def ports(self) -> dict[str, int]:
        """The ports that are bound, by their names in a RouterConfig."""
        named = {
            "port": self.clients,
            "admin_port": self.admin_port,
            "metrics_port": self.metrics,
        }
        return {name: each.getsockname()[1] for name, each in named.items() if each is not None}

    def admin_addresses(self) -> list[str]:
        """Where the server is managed: ``unix:`` and a path, or a URL."""
        found = []
        if self.admin_unix is not None:
            found.append(f"unix:{self.admin_unix.getsockname()}")
        if self.admin_port is not None:
            found.append(url_of(self.admin_port))
        return found


@contextlib.contextmanager
def open_listeners(config: RouterConfig) -> Iterator[Listeners]:
    """Bind all sockets before anything expensive; StartupError says which cannot be had."""
    with contextlib.ExitStack() as stack:
        clients = stack.enter_context(_bound(config.hostname, config.port))
        admin_unix = admin_port = metrics = None
        if config.admin_uds is not None:
            try:
                admin_unix = stack.enter_context(bind_unix(config.admin_uds))
            except OSError as error:
                raise _cannot_listen(config.admin_uds, error) from error
        if config.admin_port is not None:
            admin_port = stack.enter_context(_bound(LOOPBACK, config.admin_port))
        if config.metrics_port is not None:
            metrics = stack.enter_context(_bound(config.hostname, config.metrics_port))
        has_tls = config.ssl_certfile is not None
        yield Listeners(clients, admin_unix, admin_port, metrics, has_tls)


def port_error(hostname: str, port: int, error: OSError) -> StartupError:
    """The words for an address that cannot be had."""
    return _cannot_listen(f"{hostname}:{port}", error)


class HttpServers:
    """The servers on all listeners, which start and end together."""

    def __init__(
        self,
        config: RouterConfig,
        parts: Parts,
        listeners: Listeners,
        tls: TlsIdentity | None = None,
    ) -> None:
        timeout_s = config.client_timeout_s
        granted = granted_connections(config)
        if granted < config.max_connections:
            logger.warning("at most %d connections: the system grants no more files", granted)
        most = ConnectionLimits(max_connections=granted, client_timeout_s=timeout_s)
        few = ConnectionLimits(max_connections=_MAX_ADMINS, client_timeout_s=timeout_s)
        context = None if tls is None else tls.context
        self._servers: list[HttpServer | Fronts] = []
        if config.http_workers:
            self._servers.append(fronts_of(config, parts, listeners.clients, granted))
        else:
            self._servers.append(HttpServer(parts.app, listeners.clients, most, tls=context))
        for listener, on_unix in ((listeners.admin_unix, True), (listeners.admin_port, False)):
            if listener is not None:
                app = AdminGuard(parts.admin_app, on_unix=on_unix)
                self._servers.append(HttpServer(app, listener, few))
        if listeners.metrics is not None:
            self._servers.append(HttpServer(parts.metrics_app, listeners.metrics, few, tls=context))
        for listener in (
            listeners.clients,
            listeners.admin_unix,
            listeners.admin_port,
            listeners.metrics,
        ):
            if listener is not None:
                _listen(listener)

    async def run(self) -> None:
        """Accept connections until ``stop`` is called and the last responses are written."""
        await asyncio.gather(*(server.run() for server in self._servers))

    async def wait_started(self) -> None:
        """Return once connections are accepted everywhere."""
        await asyncio.gather(*(server.wait_started() for server in self._servers))

    def stop(self) -> None:
        """Make ``run`` return."""
        for server in self._servers:
            server.stop()


def fronts_of(
    config: RouterConfig, parts: Parts, listener: socket.socket, num_connections: int
) -> Fronts:
    """Return the processes that serve clients in place of this one, with what it does for them."""
    # Only where they are asked for: a router without them starts sooner.
    from lorax_router.fronts.plan import FrontPlan, shortened
    from lorax_router.fronts.supervisor import Fronts

    number = config.http_workers
    plans = [
        FrontPlan(
            config=shortened(config),
            number=each,
            max_connections=-(-num_connections // number),
            model_device_type=parts.info.model_device_type,
            task=parts.info.task,
            adapter_refusal=parts.selections.refusal,
            max_total_tokens=parts.info.max_total_tokens,
        )
        for each in range(1, number + 1)
    ]
    fronts = Fronts(plans, _core_of(parts), listener)
    parts.metrics.watch_fronts(fronts.usages, fronts.num_restarts)
    return fronts


def _core_of(parts: Parts) -> CoreParts:
    from lorax_router.fronts.desk import CoreParts
    from lorax_router.grpc_api.unary import UnaryCalls
    from lorax_router.service.adapters.preloading import Preloader
    from lorax_router.service.adapters.taking_over import ManagedKeeper

    return CoreParts(
        service=parts.service,
        counts=parts.service.ledger,
        app=parts.app,
        aliases=parts.selections.aliases,
        messages=UnaryCalls(parts.servicer, parts.keys),
        managed=ManagedKeeper(parts.adapters, parts.selections.aliases),
        preloads=Preloader(parts.adapters.directory, parts.engine),
    )


async def listen_for_ingresses(config: RouterConfig, parts: Parts) -> AttachedFronts | None:
    """Let ingresses attach, where the configuration says so; StartupError if that cannot be."""
    if config.ingress_uri is None:
        return None
    from lorax_router.fronts.attached import AttachedFronts
    from lorax_router.fronts.core_facts import facts_of
    from lorax_router.fronts.load import LoadTeller

    slots = parts.engine.adapter_capacity().max_resident
    attached = AttachedFronts(
        _core_of(parts),
        facts_of(config, parts.info, parts.selections),
        LoadTeller(
            parts.engine,
            parts.adapters,
            parts.service.meters,
            is_open=lambda: parts.service.is_open,
            num_slots=slots,
        ),
    )
    try:
        tls = context_in(config.ingress_tls_dir, "ingress_tls_dir", context_of_server)
        port = await attached.listen(config.ingress_uri, tls)
    except OSError as error:
        raise _cannot_listen(config.ingress_uri, error) from error
    fields = {"uri": config.ingress_uri, "port": port}
    logger.info("ingresses attach at %s", config.ingress_uri, extra={"fields": fields})
    return attached


def _bound(hostname: str, port: int) -> socket.socket:
    try:
        return bind(hostname, port)
    except OSError as error:
        raise port_error(hostname, port, error) from error


def _listen(listener: socket.socket) -> None:
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        raise _cannot_listen(str(listener.getsockname()), error) from error


def _cannot_listen(where: str, error: OSError) -> StartupError:
    taken = error.errno in (errno.EADDRINUSE, None)
    why = "another program listens there" if taken else str(error)
    code = ExitCode.PORT_IN_USE if taken else ExitCode.BAD_CONFIG
    return StartupError(f"cannot listen on {where}: {why}", code)


def granted_connections(config: RouterConfig) -> int:
    """How many clients there may be over HTTP, and as many over gRPC if that is served.

    Each is an open file, of which the system grants so many.
    """
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    if most_files == resource.RLIM_INFINITY:
        return config.max_connections
    num_listeners = 1 if config.grpc_port is None else 2
    granted = max(1, (most_files - _OWN_FILES - _MAX_ADMINS) // num_listeners)
    return min(config.max_connections, granted)
