"""The adapter calls of one rank: LoRAX's, and ours on top of them.

With ``content`` a load is the prepare lane: the handle becomes ready, and takes effect
in the step that activates it. Without it the adapter that the request names is fetched,
prepared and put into effect at once, in the place of the command queue where it arrives,
as a client of LoRAX expects.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
    Combination,
    FetchedAdapter,
    LoadReport,
    MajoritySign,
    MergeSpec,
    refused,
)
from lorax_contract.errors import ValidationError
from lorax_contract.step import BASE_ADAPTER, AdapterHandle
from lorax_proto import generate_pb2 as pb
from lorax_proto.convert_adapters import (
    content_from_proto,
    failure_to_proto,
    fetched_to_proto,
    part_from_proto,
    query_from_proto,
    source_from_proto,
    tiers_to_proto,
)
from lorax_shard.adapters.rank_adapters import RankAdapters
from lorax_shard.engine.engine import Engine
from lorax_shard.rpc.errors import NotServedError
from lorax_shard.rpc.queue import CommandQueue

_BASE_MODEL_IDS = ("", "__base_model__")
_NO_ADAPTERS = "this shard serves the base model only, without adapters"


class AdapterCalls:
    """Answers for one rank; ``rank_adapters`` is None where no adapters are served."""

    def __init__(
        self, engine: Engine, commands: CommandQueue, rank_adapters: RankAdapters | None
    ) -> None:
        self._engine = engine
        self._commands = commands
        self._given = rank_adapters

    @property
    def _rank_adapters(self) -> RankAdapters:
        if self._given is None:
            raise NotServedError(_NO_ADAPTERS)
        return self._given

    async def tiers(self, request: pb.InfoRequest) -> pb.AdapterTiers:
        """Say what is prepared, and where the parts lie that are asked for."""
        if self._given is None:
            return pb.AdapterTiers()
        parts = [part_from_proto(part) for part in request.adapter_parts]
        return tiers_to_proto(await self._rank_adapters.tiers(parts))

    async def download(self, request: pb.DownloadAdapterRequest) -> pb.DownloadAdapterResponse:
        """Fetch and verify; of a merge all its adapters."""
        if _names_base(request.adapter_parameters):
            return pb.DownloadAdapterResponse(downloaded=False, memory_fraction=0.0)
        if not request.explain:
            if not request.adapter_parameters.adapter_ids:
                raise refused("DownloadAdapter names no adapter")
            found = await self._fetch_all(
                request.adapter_parameters, request.adapter_source, request.api_token
            )
            device_bytes = sum(each.device_bytes for each in found)
            fraction = device_bytes / max(1, self._engine.memory.adapter_bytes)
            return pb.DownloadAdapterResponse(downloaded=True, memory_fraction=fraction)
        try:
            fetched = await self._rank_adapters.fetch(query_from_proto(request))
        except AdapterUnavailableError as error:
            return pb.DownloadAdapterResponse(failure=failure_to_proto(error))
        return pb.DownloadAdapterResponse(downloaded=True, fetched=fetched_to_proto(fetched))

    async def text(self, request: pb.AdapterTextRequest) -> pb.AdapterTextResponse:
        """Return those of the adapter's own tokenizer and template files that are named."""
        try:
            files: Mapping[str, bytes] = await self._rank_adapters.text(
                request.store_digest, request.names
            )
        except AdapterUnavailableError as error:
            return pb.AdapterTextResponse(failure=failure_to_proto(error))
        return pb.AdapterTextResponse(
            files=[pb.TextFile(name=name, content=data) for name, data in files.items()]
        )

    async def read(self, request: pb.ReadAdapterRequest) -> pb.ReadAdapterResponse:
        """Return a piece of a stored adapter's file, or which files there are."""
        part = part_from_proto(request.part)
        stored = self._rank_adapters.stored
        try:
            if request.HasField("file"):
                content = await asyncio.to_thread(stored.piece, part, request.file, request.offset)
                return pb.ReadAdapterResponse(content=content)
            listed = await asyncio.to_thread(stored.files, part)
        except AdapterUnavailableError as error:
            return pb.ReadAdapterResponse(failure=failure_to_proto(error))
        return pb.ReadAdapterResponse(
            files=[pb.EntryFile(**dataclasses.asdict(each)) for each in listed]
        )

    async def load(self, request: pb.LoadAdapterRequest) -> pb.LoadAdapterResponse:
        """Make a handle ready, or in LoRAX's way put an adapter into effect.

        The base model is never loaded: as in LoRAX, the answer is no.
        """
        handle = AdapterHandle(request.adapter_index)
        is_named = not request.HasField("content")
        if handle == BASE_ADAPTER or (is_named and _names_base(request.adapter_parameters)):
            return pb.LoadAdapterResponse(loaded=False)
        rank_adapters = self._rank_adapters
        if is_named:
            report = await self._load_named(handle, request)
        else:
            try:
                report = await rank_adapters.prepare(handle, given_content(request.content))
            except AdapterUnavailableError as error:
                return pb.LoadAdapterResponse(failure=failure_to_proto(error))
        return pb.LoadAdapterResponse(
            loaded=True,
            device_bytes=report.device_bytes,
            parse_s=report.parse_s,
            copy_s=report.copy_s,
        )

    async def _load_named(
        self, handle: AdapterHandle, request: pb.LoadAdapterRequest
    ) -> LoadReport:
        parameters = request.adapter_parameters
        if not parameters.adapter_ids:
            raise refused("LoadAdapter names no adapter; the base model has the index 0")
        found = await self._fetch_all(parameters, request.adapter_source, request.api_token)
        content = _content(parameters, found)
        report = await self._rank_adapters.prepare(handle, content)
        adapters = self._engine.adapters
        assert adapters is not None
        await self._commands.run(lambda: adapters.activate(handle))
        return report

    async def offload(self, request: pb.OffloadAdapterRequest) -> pb.OffloadAdapterResponse:
        """Free a handle, and say whether there was something to free.

        A client of LoRAX does not take it out of effect first.
        """
        handle = AdapterHandle(request.adapter_index)
        if handle == BASE_ADAPTER:
            return pb.OffloadAdapterResponse(offloaded=False)
        adapters = self._engine.adapters
        if adapters is not None and handle in adapters:
            if request.HasField("epoch"):
                raise refused(f"adapter {handle} is in effect; deactivate it in a step first")
            await self._commands.run(lambda: self._engine.cease(handle))
        forget = [part_from_proto(part) for part in request.forget]
        was_here = await self._rank_adapters.release(handle, forget)
        return pb.OffloadAdapterResponse(offloaded=was_here)

    def forget_prepared(self) -> None:
        """Let all handles go, none of which is in effect; host copies and files stay."""
        if self._given is not None:
            self._given.lane.forget_all()

    async def _fetch_all(
        self, parameters: pb.AdapterParameters, source: pb.AdapterSource, token: str
    ) -> list[FetchedAdapter]:
        word = source_from_proto(source)
        return [
            await self._rank_adapters.fetch(
                AdapterQuery(ref=AdapterRef.of(word, name), token=token or None)
            )
            for name in parameters.adapter_ids
        ]


def given_content(message: pb.AdapterContent) -> AdapterContent:
    """Return the content of a call; raises ValidationError for what is none."""
    try:
        return content_from_proto(message)
    except ValueError as error:
        raise ValidationError(f"the content is none: {error}") from error


def _content(parameters: pb.AdapterParameters, found: list[FetchedAdapter]) -> AdapterContent:
    """Return what LoRAX's parameters ask for; it merges where there are several adapters."""
    parts: tuple[AdapterPart, ...] = tuple(each.part for each in found)
    if len(parts) == 1:
        return AdapterContent(parts=parts)
    if len(parameters.weights) != len(parts):
        raise refused(f"a merge of {len(parts)} adapters needs as many weights")
    return AdapterContent(parts=parts, merge=_merge(parameters))


def _merge(parameters: pb.AdapterParameters) -> MergeSpec:
    try:
        return MergeSpec(
            weights=tuple(parameters.weights),
            combination=Combination(pb.MergeStrategy.Name(parameters.merge_strategy).lower()),
            density=parameters.density or None,
            majority_sign=MajoritySign(
                pb.MajoritySignMethod.Name(parameters.majority_sign_method).lower()
            ),
        )
    except ValueError as error:
        raise refused(f"such a merge is not known: {error}") from error


def _names_base(parameters: pb.AdapterParameters) -> bool:
    names = parameters.adapter_ids
    return bool(names) and all(name in _BASE_MODEL_IDS for name in names)
