"""The ingress' process: HTTP for clients, many routers behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lorax_contract.config import ConfigError
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_ingress.attaching import AttachedReplica, AttachSettings
from lorax_ingress.calls import IngressCalls
from lorax_ingress.finding import Located, ReplicaPlaces
from lorax_ingress.fleet import Fleet
from lorax_ingress.listening import GrpcCalls, cannot_listen
from lorax_ingress.messages import FleetServicer
from lorax_ingress.routing.router import AffineRouter
from lorax_ingress.service import ReplicatedService
from lorax_ingress.watching import IngressMetrics
from lorax_proto.mutual_tls import context_in, context_of_client
from lorax_router.fronts.application import FrontApplication
from lorax_router.fronts.core_facts import CoreFacts
from lorax_router.grpc_api.limits import CallLimits
from lorax_router.grpc_api.server import GrpcServer
from lorax_router.http_api.app import Cors, build_generating_app
from lorax_router.http_api.auth import METRICS_PATH, MetricsGate
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.connection import ConnectionLimits
from lorax_router.http_api.dialects import root_handler
from lorax_router.http_api.listeners import bind, url_of
from lorax_router.http_api.lorax.generate_routes import GenerateRoutes
from lorax_router.http_api.server import HttpServer
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.chat.parser_book import ParserBook
from lorax_router.service.keys.store import KeyStore
from lorax_router.service.models import Models
from lorax_router.service.origin import NOWHERE, Origin
from lorax_router.tls import TlsIdentity

logger = logging.getLogger(__name__)

_BACKLOG = 2048
# Who reads the metrics where nothing else is served.
_MAX_READERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSettings:
    """What an ingress is told."""

    # Where replicas are: NAME=URI, a URI, or dns:HOST:PORT for all addresses of a name.
    replicas: tuple[str, ...]
    hostname: str = "127.0.0.1"
    port: int = 3000
    # Of the gRPC service; None: it is not served.
    grpc_port: int | None = None
    # Whether other ingresses of this machine may listen at these ports, too.
    shares_port: bool = False
    # That serves this one's metrics alone; None: not served.
    metrics_port: int | None = None
    # For the links to replicas over TCP; None: plain.
    tls_dir: str | None = None
    api_keys_file: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    max_connections: int = 10_000
    client_timeout_s: float = 60.0
    # Seconds that a request waits for a replica to take it, where none does.
    wait_s: float = 60.0
    # Seconds after which a replica that says nothing is taken for lost.
    silence_s: float = 10.0
    # What it is called in replicas' logs.
    name: str = "ingress"


class IngressCounts:
    """Counts requests that no replica had; a RequestCounts."""

    def __init__(self, metrics: IngressMetrics) -> None:
        self._metrics = metrics

    def request_refused(
        self, error: BaseException, caller: Caller = ANYBODY, origin: Origin = NOWHERE
    ) -> None:
        """A request ended before any replica had it."""
        self._metrics.refused()

    def unknown_fields(self, count: int) -> None:
        """Nobody counts fields that nobody reads here."""


class Ingress:
    """All parts of an ingress; made inside a running loop."""

    def __init__(self, settings: IngressSettings) -> None:
        self.settings = settings
        self.metrics = IngressMetrics()
        router = AffineRouter(random.Random().randrange)
        self.fleet = Fleet(router, self.metrics, wait_s=settings.wait_s)
        self._service, self._counts = ReplicatedService(self.fleet), IngressCounts(self.metrics)
        self._registry = CollectorRegistry()
        self._registry.register(self.metrics)
        self._tls = context_in(settings.tls_dir, "--tls-dir", context_of_client)
        self._places = ReplicaPlaces(settings.replicas)

    async def attach(self) -> None:
        """Keep all replicas attached that there are, until the task is cancelled."""
        running: dict[Located, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            async for found in self._places.follow():
                for gone in running.keys() - found:
                    running.pop(gone).cancel()
                for each in found - running.keys():
                    running[each] = group.create_task(self._replica(each).run())

    def _replica(self, found: Located) -> AttachedReplica:
        return AttachedReplica(
            found.name, found.uri, self.fleet, ParserBook(), ingress=self.settings.name,
            tls=self._tls, host=found.host, settings=AttachSettings(silence_s=self.settings.silence_s),
        )  # fmt: skip

    def grpc_server(self, facts: CoreFacts, keys: KeyStore, tls: TlsIdentity | None) -> GrpcServer:
        """Return what answers clients over gRPC."""
        settings = self.settings
        limits = CallLimits(
            max_connections=settings.max_connections, max_calls=settings.max_connections,
            max_message_bytes=facts.max_body_bytes, client_timeout_s=settings.client_timeout_s,
            shares_port=settings.shares_port,
        )  # fmt: skip
        servicer = FleetServicer(self._service, self._counts, self.fleet)
        return GrpcServer(servicer, limits, keys=keys, tls=tls)

    def application(self, facts: CoreFacts, keys: KeyStore) -> ASGIApp:
        """Return what answers clients, once a replica said what it serves."""
        service, counts = self._service, self._counts
        models = Models(
            facts.model_id, facts.served_model_names, facts.max_total_tokens, self.fleet.selections
        )
        bound = facts.max_body_bytes
        calls = Calls(service, models, counts, max_body_bytes=bound)
        routes = GenerateRoutes(
            service, counts, model_id=facts.model_id, device_type=facts.model_device_type,
            max_body_bytes=bound, root=root_handler(calls, facts.task),
        )  # fmt: skip
        own = build_generating_app(routes, calls, keys, Cors(), service, counts)
        others = IngressCalls(self.fleet, {METRICS_PATH: self.metrics_application(keys)}, bound)
        others.own.update(dict.fromkeys(("/health", "/ping"), others.health))
        return FrontApplication(own.app, others, own.paths)

    def metrics_application(self, keys: KeyStore) -> ASGIApp:
        """Return what answers who reads the metrics, at whichever path."""
        return MetricsGate(self._answer_metrics, keys)

    async def _answer_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = generate_latest(self._registry)
        await Response(body, media_type="text/plain")(scope, receive, send)


async def serve(settings: IngressSettings) -> None:
    """Serve until a signal comes, then finish what runs."""
    keys, tls = _keys(settings), _tls(settings)
    ingress, stopping = Ingress(settings), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    with _listeners(settings) as (listener, metrics):
        async with asyncio.TaskGroup() as group:
            helping = [group.create_task(ingress.attach()), group.create_task(keys.follow())]
            if tls is not None:
                helping.append(group.create_task(tls.follow()))
            if await _either(ingress.fleet.is_known, stopping):
                await _serve(ingress, keys, tls, (listener, metrics), stopping)
            for each in helping:
                each.cancel()


async def _serve(
    ingress: Ingress,
    keys: KeyStore,
    tls: TlsIdentity | None,
    listeners: tuple[socket.socket, socket.socket | None],
    stopping: asyncio.Event,
) -> None:
    settings, facts = ingress.settings, ingress.fleet.facts
    assert facts is not None
    listener, metrics = listeners
    limits = ConnectionLimits(
        max_connections=settings.max_connections, client_timeout_s=settings.client_timeout_s
    )
    context = None if tls is None else tls.context
    servers = [HttpServer(ingress.application(facts, keys), listener, limits, tls=context)]
    if metrics is not None:
        few = ConnectionLimits(max_connections=_MAX_READERS)
        servers.append(HttpServer(ingress.metrics_application(keys), metrics, few, tls=context))
    for each in listeners:
        if each is not None:
            each.listen(_BACKLOG)
    running = asyncio.gather(*(server.run() for server in servers))
    for server in servers:
        await server.wait_started()
    grpc_calls = await GrpcCalls.start(
        ingress.grpc_server(facts, keys, tls), settings.hostname, settings.grpc_port
    )
    _say_ready(listener, metrics, "http" if tls is None else "https")
    await stopping.wait()
    for server in servers:
        server.stop()
    await asyncio.gather(running, grpc_calls.end())


def _say_ready(listener: socket.socket, metrics: socket.socket | None, scheme: str) -> None:
    url = url_of(listener, scheme)
    fields = {"event": "ready", "url": url}
    if metrics is not None:
        fields["metrics"] = f"{url_of(metrics, scheme)}{METRICS_PATH}"
    logger.info("ready on %s", url, extra={"fields": fields})


async def _either(event: asyncio.Event, stopping: asyncio.Event) -> bool:
    """Wait for one of two events; whether it is the first one."""
    waiting = [asyncio.ensure_future(each.wait()) for each in (event, stopping)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for each in waiting:
        each.cancel()
    return not stopping.is_set()


@contextlib.contextmanager
def _listeners(
    settings: IngressSettings,
) -> Iterator[tuple[socket.socket, socket.socket | None]]:
    """Bind the sockets for clients, and for who reads the metrics; StartupError."""
    with contextlib.ExitStack() as stack:

        def bound(port: int, *, shares_port: bool = False) -> socket.socket:
            try:
                return stack.enter_context(bind(settings.hostname, port, shares_port=shares_port))
            except OSError as error:
                raise cannot_listen(settings.hostname, port, error.strerror) from error

        clients = bound(settings.port, shares_port=settings.shares_port)
        metrics = None if settings.metrics_port is None else bound(settings.metrics_port)
        yield clients, metrics


def _keys(settings: IngressSettings) -> KeyStore:
    try:
        return KeyStore(path=settings.api_keys_file)
    except ConfigError as error:
        raise StartupError(str(error), ExitCode.BAD_CONFIG) from error


def _tls(settings: IngressSettings) -> TlsIdentity | None:
    if settings.ssl_certfile is None:
        return None
    try:
        return TlsIdentity(settings.ssl_certfile, settings.ssl_keyfile)
    except ConfigError as error:
        raise StartupError(str(error), ExitCode.BAD_CONFIG) from error
