# ruff: noqa: N802 - the methods bear the names that the proto gives them.
"""The public gRPC service over a fleet: what generates as the router has it, the rest by replicas."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from google.protobuf.message import Message

from lorax_contract.errors import AdapterNotLoadedError, UnhealthyError
from lorax_ingress.fleet import Fleet, Replica
from lorax_proto import lorax_pb2 as pb
from lorax_router.grpc_api.boundary import PublicCall
from lorax_router.grpc_api.generating import GeneratingServicer
from lorax_router.grpc_api.unary import REQUESTS
from lorax_router.service.callers import Caller
from lorax_router.service.generation import GenerationService, RequestCounts

Answer = TypeVar("Answer", bound=Message)


class FleetDoor:
    """Lets everybody in while some replica takes requests; a ServiceDoor.

    Args:
        fleet: the replicas.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def check_room(self, caller: Caller) -> None:
        """Let everybody in: whether there is room, the replica says that the request goes to."""

    async def health(self) -> None:
        """Raise UnhealthyError where no replica takes requests."""
        if not self._fleet.is_open:
            raise _nobody()


class FleetServicer(GeneratingServicer):
    """Generates by the fleet; one replica answers the rest, or all do what manages adapters."""

    passed_on = frozenset(REQUESTS)

    def __init__(self, service: GenerationService, counts: RequestCounts, fleet: Fleet) -> None:
        super().__init__(service, counts, FleetDoor(fleet))
        self._fleet = fleet

    async def Tokenize(self, request: pb.TokenizeRequest, call: PublicCall) -> pb.TokenizeResponse:
        """Answer with the tokens of a text, or of a chat as it is rendered."""
        return await self._by_one(request, call, pb.TokenizeResponse)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, call: PublicCall
    ) -> pb.DetokenizeResponse:
        """Answer with the text of token ids."""
        return await self._by_one(request, call, pb.DetokenizeResponse)

    async def Info(self, request: pb.InfoRequest, call: PublicCall) -> pb.InfoResponse:
        """Answer with the model and its limits, those of one replica."""
        return await self._by_one(request, call, pb.InfoResponse)

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, call: PublicCall
    ) -> pb.ListAdaptersResponse:
        """Answer with a page of the adapters that one replica knows."""
        return await self._by_one(request, call, pb.ListAdaptersResponse)

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, call: PublicCall
    ) -> pb.LoadAdapterResponse:
        """Answer when the adapter is there on all replicas."""
        return await self._by_all(request, call, pb.LoadAdapterResponse)

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, call: PublicCall
    ) -> pb.UnloadAdapterResponse:
        """Answer when its memory is free on all replicas."""
        return await self._by_all(request, call, pb.UnloadAdapterResponse, may_lack=True)

    async def _by_one(self, request: Message, call: PublicCall, kind: type[Answer]) -> Answer:
        return await _ask(self._fleet.lightest(self._taking()), request, call, kind)

    async def _by_all(
        self, request: Message, call: PublicCall, kind: type[Answer], *, may_lack: bool = False
    ) -> Answer:
        """Return what the first one says, or what went wrong at one once all have answered.

        ``may_lack``: it is enough if one of them knows the adapter, which requests may have brought.
        """
        async with self._fleet.managed.changing():
            asked = [_ask(each, request, call, kind) for each in self._taking()]
            answers: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
        if may_lack:
            found = [each for each in answers if not isinstance(each, AdapterNotLoadedError)]
            answers = found or answers
        for each in answers:
            if isinstance(each, BaseException):
                raise each
        return answers[0]  # type: ignore[no-any-return]

    def _taking(self) -> list[Replica]:
        """Return the replicas that answer such calls."""
        found = [
            each for each in self._fleet.replicas.values()
            if each.facts is not None and each.facts.takes_messages
        ]  # fmt: skip
        if not found:
            raise _nobody()
        return found


async def _ask(replica: Replica, request: Message, call: PublicCall, kind: type[Answer]) -> Answer:
    data = request.SerializeToString()
    answer = kind()
    answer.ParseFromString(await replica.messages.answer(call.method, data, call.metadata))
    return answer


def _nobody() -> UnhealthyError:
    text = "no replica is attached that takes requests"
    return UnhealthyError(text, public=text)
