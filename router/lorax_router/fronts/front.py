"""What a front is made of: the application, and who takes which message of the core's."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp

from lorax_contract.adapters import ALIAS_SOURCE, AdapterRef
from lorax_router.fronts.application import FrontApplication
from lorax_router.fronts.forwarding import FIRST_NUMBER, ForwardedCalls
from lorax_router.fronts.link import Link
from lorax_router.fronts.messages import (
    PullPart,
    TellAliases,
    TellCall,
    TellFault,
    TellStop,
    decode_down,
)
from lorax_router.fronts.plan import FrontPlan
from lorax_router.fronts.remote import RemoteCounts, RemoteService
from lorax_router.http_api.app import Cors, build_generating_app
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.dialects import root_handler
from lorax_router.http_api.lorax.generate_routes import GenerateRoutes
from lorax_router.service.adapters.aliases import Alias, AliasBook
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.chat.parser_book import ParserBook
from lorax_router.service.keys.store import KeyStore
from lorax_router.service.models import Models


class Front:
    """One front without its sockets.

    ``link`` is set before the first request comes; ``on_stop`` is called when the core says that
    no more connections come.
    """

    def __init__(self, plan: FrontPlan, keys: KeyStore) -> None:
        self.link: Link
        self.on_stop: Callable[[], None] = lambda: None
        self.is_stopping = False
        config = plan.config
        # What names mean is the core's affair: here counts only which there are.
        self._aliases = AliasBook()
        selections = SelectionPolicy(
            refusal=plan.adapter_refusal,
            default_source=config.default_adapter_source,
            aliases=self._aliases,
        )
        self._service = RemoteService(self._send, ParserBook.with_plugin(config.tool_parser_plugin))
        self._others = ForwardedCalls(self._send)
        self.app = self._application(plan, keys, selections)

    def _application(self, plan: FrontPlan, keys: KeyStore, selections: SelectionPolicy) -> ASGIApp:
        config, counts = plan.config, RemoteCounts(self._send)
        bound = config.max_body_bytes
        models = Models(
            config.model_id, config.served_model_names, plan.max_total_tokens, selections
        )
        calls = Calls(
            self._service,
            models,
            counts,
            max_body_bytes=bound,
            max_concurrent_requests=config.max_concurrent_requests,
        )
        own = build_generating_app(
            GenerateRoutes(
                self._service,
                counts,
                model_id=config.model_id,
                device_type=plan.model_device_type,
                max_body_bytes=bound,
                root=root_handler(calls, plan.task),
            ),
            calls,
            keys,
            Cors.of(config),
            self._service,
            counts,
        )
        return FrontApplication(own.app, self._others, own.paths)

    def take(self, data: memoryview) -> None:
        """Take a message of the core's."""
        match message := decode_down(data):
            case TellAliases(known, dropped):
                self._take_aliases(known, dropped)
            case PullPart() | TellCall():
                self._others.take(message)
            case TellFault(number) if number >= FIRST_NUMBER:
                self._others.take(message)
            case TellStop():
                self.is_stopping = True
                self.on_stop()
            case _:
                self._service.take(message)

    def _take_aliases(self, known: list[str], dropped: list[str]) -> None:
        for name in known:
            ref = AdapterRef(source=ALIAS_SOURCE, id=name)
            self._aliases.put(Alias(name=name, target=AdapterSelection(refs=(ref,))))
        for name in dropped:
            self._aliases.drop(name)

    def _send(self, message: bytes) -> None:
        self.link.send(message)
