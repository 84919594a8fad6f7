"""Rank 0 as a rank on another machine asks it for adapters: over the shards' own service."""

from __future__ import annotations

from typing import Any

import grpc

from lorax_contract.adapters import AdapterPart, AdapterUnavailableError, Reason
from lorax_contract.config import ShardConfig
from lorax_proto import generate_pb2 as pb
from lorax_proto import generate_pb2_grpc as pb_grpc
from lorax_proto.convert_adapters import failure_from_proto, part_to_proto
from lorax_proto.mutual_tls import MutualTls, blocking_channel_to
from lorax_shard.adapters.copies.pieces import EntryFile

_TIMEOUT_S = 30.0


class RankZero:
    """Reads stored adapters of rank 0; any thread may, none that runs an event loop.

    Args:
        uri: where rank 0 listens.
        tls: what is shown to it; None: plain text, on this machine alone.
    """

    def __init__(self, uri: str, tls: MutualTls | None) -> None:
        self._uri = uri
        self._channel = blocking_channel_to(uri, tls)
        # The generated stub has no types.
        self._stub: Any = pb_grpc.LoraxServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def files(self, part: AdapterPart) -> list[EntryFile]:
        """Return all files of a stored adapter; raises AdapterUnavailableError."""
        reply = self._read(pb.ReadAdapterRequest(part=part_to_proto(part)))
        return [
            EntryFile(
                name=each.name, size=each.size, sha256=each.sha256, is_derived=each.is_derived
            )
            for each in reply.files
        ]

    def piece(self, part: AdapterPart, file: int, offset: int) -> bytes:
        """Return a piece of a file; raises AdapterUnavailableError."""
        request = pb.ReadAdapterRequest(part=part_to_proto(part), file=file, offset=offset)
        return self._read(request).content

    def _read(self, request: pb.ReadAdapterRequest) -> pb.ReadAdapterResponse:
        try:
            reply: pb.ReadAdapterResponse = self._stub.ReadAdapter(request, timeout=_TIMEOUT_S)
        except (grpc.RpcError, ValueError) as error:
            words = error.details() if isinstance(error, grpc.Call) else str(error)
            text = f"the adapter cannot be read from rank 0 at {self._uri}: {words}"
            raise AdapterUnavailableError(Reason.TRANSIENT, text) from error
        if reply.HasField("failure"):
            raise failure_from_proto(reply.failure)
        return reply

    def close(self) -> None:
        """End the connection; calls under way fail."""
        self._channel.close()


def rank_zero_of(config: ShardConfig) -> RankZero | None:
    """Return rank 0 for a rank that may have a store of its own; None: it shares rank 0's."""
    if config.rank == 0 or not config.fetches:
        return None
    return RankZero(config.shard_uris[0], MutualTls.read(config.shard_tls_dir))
