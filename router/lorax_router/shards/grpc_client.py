"""One rank over gRPC: the ShardClient that speaks to a shard process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterTiers,
    FetchedAdapter,
    LoadReport,
)
from lorax_contract.constraint import Constraint
from lorax_contract.errors import (
    ShardError,
    ShardUnavailableError,
    StaleEpochError,
    ValidationError,
)
from lorax_contract.step import AdapterHandle, ShardInfo, StepOutcome, StepPlan, WarmupSpec
from lorax_proto import generate_pb2 as pb
from lorax_proto import generate_pb2_grpc as pb_grpc
from lorax_proto.convert import (
    constraint_to_proto,
    info_from_proto,
    outcome_from_proto,
    step_to_proto,
    warmup_to_proto,
)
from lorax_proto.convert_adapters import (
    content_to_proto,
    failure_from_proto,
    fetched_from_proto,
    load_from_proto,
    part_to_proto,
    query_to_proto,
    tiers_from_proto,
)
from lorax_proto.mutual_tls import MutualTls, channel_to
from lorax_proto.transport import error_of

logger = logging.getLogger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTimeouts:
    """Seconds after which an unanswered call counts as lost, and for how long to reconnect.

    Fetching an adapter has none: it may wait in the shard for others' turns, and from its own
    on the shard itself ends it in time, and in words.
    """

    info_s: float = 10.0
    health_s: float = 10.0
    warmup_s: float = 600.0
    step_s: float = 600.0
    adapter_s: float = 600.0
    constraint_s: float = 60.0
    # How long a lost connection is tried again before the shard counts as gone.
    reconnect_s: float = 2.0


class GrpcShardClient:
    """Implements ShardClient for one rank.

    Bound to the epoch that the first ``info`` reports: every state-changing call
    names it, so a shard that restarted refuses the call with StaleEpochError, and
    the next incarnation needs a client of its own. Calls that may be repeated are
    sent once more when the connection broke: a step keeps its sequence number, to
    which the shard answers with the stored reply if it had executed it.

    Args:
        uri: ``unix:/path``, ``unix:///path`` or ``host:port``.
        timeouts: deadlines of the calls.
        tls: what is shown to a shard that is reached by TCP; None: plain text.
    """

    def __init__(
        self, uri: str, *, timeouts: CallTimeouts | None = None, tls: MutualTls | None = None
    ) -> None:
        self.uri = uri
        self._who = f"shard at {uri}"
        self._timeouts = timeouts or CallTimeouts()
        self._channel = channel_to(uri, tls)
        # The generated stub has no types.
        self._stub = pb_grpc.LoraxServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._epoch: int | None = None

    async def discover(self) -> tuple[str, ...]:
        """Return the addresses of all ranks, in order of rank."""
        request = pb.ServiceDiscoveryRequest()
        timeout_s = self._timeouts.info_s
        reply: pb.ServiceDiscoveryResponse = await self._call(
            self._stub.ServiceDiscovery, request, timeout_s
        )
        return tuple(reply.urls)

    async def info(self) -> ShardInfo:
        """Return what the shard is; the first answer binds this client to its epoch."""
        request = pb.InfoRequest()
        reply: pb.InfoResponse = await self._call(self._stub.Info, request, self._timeouts.info_s)
        if not reply.epoch:
            raise ShardError(
                f"{self._who} names no epoch, so it is not a shard of lorax-py; "
                "point the router at one"
            )
        if self._epoch is None:
            self._epoch = reply.epoch
        return info_from_proto(reply, (self.uri,))

    async def warmup(self, spec: WarmupSpec) -> int:
        """Size the KV pool and return its number of blocks."""
        request = warmup_to_proto(spec, await self._bound_epoch())
        reply: pb.WarmupResponse = await self._call(
            self._stub.Warmup, request, self._timeouts.warmup_s, repeat=False
        )
        return reply.num_blocks

    async def step(self, plan: StepPlan) -> StepOutcome:
        """Execute one step: Prefill when rows enter, Decode otherwise."""
        request = step_to_proto(plan, self._epoch or await self._bound_epoch())
        enters = isinstance(request, pb.PrefillRequest)
        reply: pb.PrefillResponse | pb.DecodeResponse = await self._call(
            self._stub.Prefill if enters else self._stub.Decode, request, self._timeouts.step_s
        )
        return outcome_from_proto(reply, plan.seq)

    async def clear(self, seq: int) -> None:
        """Drop all rows, in the order of the commit lane."""
        request = pb.ClearCacheRequest(epoch=await self._bound_epoch(), seq=seq)
        await self._call(self._stub.ClearCache, request, self._timeouts.step_s)

    async def take_over(self, epoch: int) -> None:
        """Begin an epoch with shards that served another router, and bind this client to it."""
        request = pb.ClearCacheRequest(epoch=await self._bound_epoch(), next_epoch=epoch)
        await self._call(self._stub.ClearCache, request, self._timeouts.step_s, repeat=False)
        self._epoch = epoch

    async def fetch_adapter(self, query: AdapterQuery) -> FetchedAdapter:
        """Have an adapter fetched and verified; raises AdapterUnavailableError."""
        reply: pb.DownloadAdapterResponse = await self._call(
            self._stub.DownloadAdapter, query_to_proto(query), None
        )
        if reply.HasField("failure"):
            raise failure_from_proto(reply.failure)
        return fetched_from_proto(reply.fetched)

    async def adapter_text(self, store_digest: str, names: Sequence[str]) -> dict[str, bytes]:
        """Return named text files of a fetched adapter; raises AdapterUnavailableError."""
        request = pb.AdapterTextRequest(
            store_digest=store_digest, names=names, epoch=await self._bound_epoch()
        )
        reply: pb.AdapterTextResponse = await self._call(
            self._stub.AdapterText, request, self._timeouts.adapter_s
        )
        if reply.HasField("failure"):
            raise failure_from_proto(reply.failure)
        return {file.name: file.content for file in reply.files}

    async def prepare_adapter(self, handle: AdapterHandle, content: AdapterContent) -> LoadReport:
        """Make an adapter ready; may be repeated."""
        request = pb.LoadAdapterRequest(
            adapter_index=handle,
            epoch=await self._bound_epoch(),
            content=content_to_proto(content),
        )
        return load_from_proto(
            await self._call(self._stub.LoadAdapter, request, self._timeouts.adapter_s)
        )

    async def release_adapter(
        self, handle: AdapterHandle, forget: Sequence[AdapterPart] = ()
    ) -> None:
        """Free what ``prepare_adapter`` made; may be repeated."""
        request = pb.OffloadAdapterRequest(
            adapter_index=handle,
            epoch=await self._bound_epoch(),
            forget=[part_to_proto(part) for part in forget],
        )
        await self._call(self._stub.OffloadAdapter, request, self._timeouts.adapter_s)

    async def prepare_constraint(
        self, constraint: Constraint, content: AdapterContent | None = None
    ) -> None:
        """Make a constraint ready; may be repeated. Raises ValidationError in words."""
        request = pb.PrepareConstraintRequest(
            constraint=constraint_to_proto(constraint),
            content=None if content is None else content_to_proto(content),
            epoch=await self._bound_epoch(),
        )
        reply: pb.PrepareConstraintResponse = await self._call(
            self._stub.PrepareConstraint, request, self._timeouts.constraint_s
        )
        if reply.HasField("refusal"):
            raise ValidationError(reply.refusal)
        if reply.HasField("failure"):
            raise failure_from_proto(reply.failure)

    async def adapter_tiers(self, parts: Sequence[AdapterPart]) -> AdapterTiers:
        """Return what is prepared and where these parts lie."""
        request = pb.InfoRequest(
            with_adapters=True, adapter_parts=[part_to_proto(part) for part in parts]
        )
        reply: pb.InfoResponse = await self._call(self._stub.Info, request, self._timeouts.info_s)
        return tiers_from_proto(reply.adapters)

    async def health(self) -> None:
        """Return if the shard answers and its engine thread is alive."""
        await self._call(self._stub.Health, pb.HealthRequest(), self._timeouts.health_s)

    async def lost(self) -> ShardError:
        """Return once the connection broke for good, or to another incarnation of the shard."""
        while True:
            state = self._channel.get_state(try_to_connect=True)
            if state is not grpc.ChannelConnectivity.READY:
                try:
                    reply: pb.InfoResponse = await self._call(
                        self._stub.Info, pb.InfoRequest(), self._timeouts.info_s
                    )
                except ShardUnavailableError as error:
                    return error
                if self._epoch is not None and reply.epoch != self._epoch:
                    return StaleEpochError(
                        f"{self._who}: epoch {self._epoch} is over, it is epoch {reply.epoch} now"
                    )
                state = self._channel.get_state()
            await self._channel.wait_for_state_change(state)

    async def close(self) -> None:
        """Close the connection; calls in flight fail."""
        await self._channel.close(None)

    async def _bound_epoch(self) -> int:
        if self._epoch is None:
            await self.info()
        assert self._epoch is not None
        return self._epoch

    async def _call(
        self,
        method: Callable[..., Awaitable[Response]],
        request: Request,
        timeout_s: float | None,
        *,
        repeat: bool = True,
    ) -> Response:
        """Call one RPC, once more if the connection broke; foreign errors become ours."""
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            lost = error.code() is grpc.StatusCode.UNAVAILABLE
            first = error_of(error.code(), _words(error, timeout_s), self._who)
            if not (lost and repeat and await self._reconnected()):
                raise first from error
        except grpc.aio.UsageError as error:
            raise ShardUnavailableError(f"{self._who}: the connection is closed") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not whoever waits was cancelled, but the call, since the connection is being closed.
            raise ShardUnavailableError(f"{self._who}: the connection was closed") from None
        logger.warning("%s was unavailable and is back: the call is repeated", self._who)
        try:
            return await self._call(method, request, timeout_s, repeat=False)
        except ShardUnavailableError as again:
            # Gone for good. A shard that ends says why, and then there is nobody to say it again.
            raise first from again

    async def _reconnected(self) -> bool:
        """Wait for a connection; False when there is none in time."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), self._timeouts.reconnect_s)
        except (TimeoutError, grpc.aio.UsageError):
            return False
        return True


def _words(error: grpc.aio.AioRpcError, timeout_s: float | None) -> str | None:
    """What went wrong; gRPC itself says of a deadline that it was exceeded and no more."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and timeout_s is not None:
        return f"no answer within {timeout_s:g} s"
    return error.details()
