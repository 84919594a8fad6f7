"""Messages from a router to a shard: a few calls in a row, to a toy model behind the real service."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from tests.fuzz.targets.messages import MESSAGE_MUTATORS
from tests.fuzz.targets.mutate import BYTE_MUTATORS
from tests.fuzz.targets.target import Case, LoopTarget, Mutator, require, require_words
from tests.helpers.ready_adapters import PART, ReadyAdapters
from tests.helpers.toy_adapters import make_engine
from tests.helpers.toy_paged_model import (
    BLOCK_SIZE,
    expected_tokens,
    make_plan,
    new_row,
)

from lorax_contract.config import ShardConfig
from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.step import StepPlan
from lorax_proto import generate_pb2 as pb
from lorax_proto.convert import outcome_from_proto, step_to_proto
from lorax_shard.adapters.host_cache import HostCache
from lorax_shard.adapters.rank_adapters import RankAdapters
from lorax_shard.rpc.queue import CommandQueue
from lorax_shard.rpc.server import ShardServer
from lorax_shard.store.store import AdapterStore

_SERVICE = pb.DESCRIPTOR.services_by_name["LoraxService"]
_BROKEN = ("UNKNOWN", "DEADLINE_EXCEEDED", "CANCELLED", "UNAVAILABLE")
_UNEXPECTED = "the shard failed inside"
_PROMPT = [40, 41, 42, 43, 44]
_PATIENCE_S = 60.0
# What stands in a case for the epoch that it is played in.
_THIS_EPOCH = 1
# Calls that take no part in the steps.
_BESIDE: dict[str, Message] = {
    "Info": pb.InfoRequest(with_adapters=True),
    "Health": pb.HealthRequest(),
    "ServiceDiscovery": pb.ServiceDiscoveryRequest(),
    "FilterBatch": pb.FilterBatchRequest(batch_id=1, request_ids=[1]),
    "Embed": pb.EmbedRequest(),
    "Classify": pb.ClassifyRequest(),
    "DownloadAdapter": pb.DownloadAdapterRequest(
        adapter_parameters=pb.AdapterParameters(adapter_ids=["x"]), explain=True
    ),
    "LoadAdapter": pb.LoadAdapterRequest(
        adapter_index=101,
        content=pb.AdapterContent(
            parts=[pb.AdapterPart(content_digest=PART.content_digest, store_digest="a")]
        ),
    ),
    "OffloadAdapter": pb.OffloadAdapterRequest(adapter_index=101),
    "AdapterText": pb.AdapterTextRequest(store_digest="a", names=["tokenizer.json"]),
    "ReadAdapter": pb.ReadAdapterRequest(
        part=pb.AdapterPart(content_digest="b", store_digest="a"), file=1, offset=2
    ),
    "PrepareConstraint": pb.PrepareConstraintRequest(
        constraint=pb.Constraint(kind="CONSTRAINT_KIND_REGEX", text="[ab]+")
    ),
}


class ShardCalls(LoopTarget):
    """A content is a list of calls: names of methods and requests, or the bytes of one."""

    name = "shard"
    num_per_opening = 400
    # Of plans that contradict themselves.
    logged_errors = ("did not take effect", "ceases while request")

    def __init__(self) -> None:
        self.mutators = {name: _of_request(each) for name, each in MESSAGE_MUTATORS.items()} | {
            "call_beside": _call_beside, "left_out": _left_out, "twice": _twice,
        }  # fmt: skip
        self.raw_mutators = {name: _of_bytes(each) for name, each in BYTE_MUTATORS.items()}
        self._epoch = 0

    def plain(self, draw: random.Random) -> Any:
        """Return a prefill and some decodes of rows, by a plan or in LoRAX's way."""
        return draw.choice([_planned, _planned, _lorax])(draw)

    def written(self, content: Any) -> Any:
        """Return the same with the requests as bytes."""
        return [(name, request.SerializeToString()) for name, request in content]

    async def opened(self, stack: contextlib.AsyncExitStack) -> None:
        """Start a shard in this process."""
        folder = Path(stack.enter_context(TemporaryDirectory()))
        lane = ReadyAdapters()
        lane.gate.set()
        engine, _ = make_engine(lane)
        uri = f"unix:{folder}/shard"
        config = ShardConfig(
            model_dir="toy", model_id="toy", shard_uris=[uri], block_size=BLOCK_SIZE, epoch=1
        )
        self._epoch = _THIS_EPOCH
        commands = CommandQueue(1, gap_timeout_s=0.05)
        anything: Any = lane
        store = AdapterStore(folder / "store", max_bytes=1 << 20)
        adapters = RankAdapters(anything, HostCache(store, host_bytes=1 << 20), store, None)
        server = ShardServer(config, engine, commands, adapters)
        await server.start()
        stack.push_async_callback(commands.close, 5.0)
        stack.push_async_callback(adapters.close)
        stack.push_async_callback(server.stop, 1.0)
        self._channel = await stack.enter_async_context(grpc.aio.insecure_channel(uri))

    async def judged(self, case: Case) -> str:
        """Each call is answered, or refused in words; then a new router finds it as it was."""
        outcome = "taken"
        for name, raw in case.content:
            outcome = await self._called(name, raw, outcome)
        await self._check_serves()
        return outcome

    async def _called(self, name: str, raw: bytes, outcome: str) -> str:
        try:
            await self._call(name, self._of_now(name, raw))
        except grpc.aio.AioRpcError as error:
            status, text = error.code().name, error.details() or ""
            require(status not in _BROKEN, f"{name}: {status}: {text}")
            # grpc's own word for bytes that are no message of the kind.
            require(_UNEXPECTED not in text, f"{name}: {status}: {text}")
            require_words(text, most=20_000)
            return "refused"
        return outcome

    def _of_now(self, name: str, raw: bytes) -> bytes:
        """Return a request of the epoch that the case is played in."""
        message = _SERVICE.methods_by_name[name].input_type._concrete_class()
        try:
            message.ParseFromString(raw)
        except DecodeError:
            return raw
        if getattr(message, "epoch", 0) != _THIS_EPOCH:
            return raw
        message.epoch = self._epoch
        return message.SerializeToString()

    async def _call(self, name: str, raw: bytes) -> Any:
        method = self._channel.unary_unary(
            f"/{_SERVICE.full_name}/{name}",
            response_deserializer=_SERVICE.methods_by_name[
                name
            ].output_type._concrete_class.FromString,
        )
        return await method(raw, timeout=_PATIENCE_S)

    async def _check_serves(self) -> None:
        """Begin the epoch of a router that finds the shard, and have it compute."""
        await self._begin()
        warmup = pb.WarmupRequest(
            max_input_length=32, max_prefill_tokens=16, max_new_tokens=16, max_rows=4,
            epoch=self._epoch, seq=1,
        )  # fmt: skip
        await self._call("Warmup", warmup.SerializeToString())
        plan = make_plan(2, [(7, len(_PROMPT), [0, 1])], new=[new_row(7, _PROMPT)])
        request = step_to_proto(plan, self._epoch)
        reply = await self._call("Prefill", request.SerializeToString())
        ids = outcome_from_proto(reply, 2).tokens.ids
        require(list(ids) == expected_tokens(_PROMPT, 1), f"it computes {ids} now")
        await self._begin()

    async def _begin(self) -> None:
        """Be another router."""
        self._epoch += 1
        begin = pb.ClearCacheRequest(next_epoch=self._epoch)
        await self._call("ClearCache", begin.SerializeToString())


def _planned(draw: random.Random) -> list[tuple[str, Message]]:
    """A prefill and decodes as the router plans them."""
    num_rows, calls, blocks = draw.randint(1, 3), [], iter(range(64))
    rows = []
    for number in range(1, num_rows + 1):
        ids = [draw.randrange(30, 60) for _ in range(draw.randint(1, 7))]
        rows.append(new_row(number, ids, max_new_tokens=4, **_some_options(draw)))
    lengths = {row.spec.request_id: len(row.spec.prompt_ids) for row in rows}
    held: dict[int, int] = dict.fromkeys(lengths, 0)

    def work(num_tokens: dict[int, int], at: dict[int, int]) -> list[tuple[int, int, list[int]]]:
        found = []
        for row, number in num_tokens.items():
            needed = -(-(at[row] + number) // BLOCK_SIZE) - held[row]
            held[row] += needed
            found.append((row, number, [next(blocks) for _ in range(needed)]))
        return found

    first = make_plan(1, work(lengths, dict.fromkeys(lengths, 0)), new=rows)
    calls.append(_as_call(first))
    for seq in range(2, draw.randint(2, 4)):
        at = {row: length + seq - 2 for row, length in lengths.items()}
        calls.append(_as_call(make_plan(seq, work(dict.fromkeys(lengths, 1), at))))
    return calls


def _some_options(draw: random.Random) -> dict[str, Any]:
    options: list[dict[str, Any]] = [
        {}, {"do_sample": True, "temperature": 0.7, "seed": 3}, {"repetition_penalty": 1.3},
        {"num_alternatives": 3}, {"prompt_logprobs": True}, {"stop_sequences": ("x",)},
        {"min_new_tokens": 2}, {"constraint": Constraint(kind=ConstraintKind.REGEX, text="[a-z]+")},
    ]  # fmt: skip
    return draw.choice(options)


def _as_call(plan: StepPlan) -> tuple[str, Message]:
    return ("Prefill" if plan.new_rows else "Decode"), step_to_proto(plan, _THIS_EPOCH)


def _lorax(draw: random.Random) -> list[tuple[str, Message]]:
    """A batch as LoRAX's router has it."""
    requests = [
        pb.Request(
            id=number,
            inputs="the quick brown fox",
            tokenized_inputs=pb.TokenizedInputs(ids=draw.choice([[], _PROMPT])),
            stopping_parameters=pb.StoppingCriteriaParameters(max_new_tokens=4),
            parameters=pb.NextTokenChooserParameters(temperature=1.0, repetition_penalty=1.0),
        )
        for number in range(1, draw.randint(2, 4))
    ]
    cached = pb.CachedBatch(id=1)
    return [
        ("Prefill", pb.PrefillRequest(batch=pb.Batch(id=1, requests=requests))),
        ("Decode", pb.DecodeRequest(batches=[cached])),
        ("FilterBatch", pb.FilterBatchRequest(batch_id=1, request_ids=[1])),
        ("Decode", pb.DecodeRequest(batches=[cached])),
    ]


def _of_request(mutator: Mutator) -> Mutator:
    def change(draw: random.Random, content: Any) -> Any:
        place = draw.randrange(len(content)) if content else 0
        return [
            (name, mutator(draw, request) if number == place else request)
            for number, (name, request) in enumerate(content)
        ]

    return change


_of_bytes = _of_request


def _call_beside(draw: random.Random, content: Any) -> Any:
    """Another call between them."""
    place = draw.randint(0, len(content))
    name = draw.choice(sorted(_BESIDE))
    return [*content[:place], (name, _BESIDE[name]), *content[place:]]


def _left_out(draw: random.Random, content: Any) -> Any:
    """One of them does not come."""
    place = draw.randint(0, len(content))
    return [*content[:place], *content[place + 1 :]]


def _twice(draw: random.Random, content: Any) -> Any:
    """One of them comes twice, or in another's place."""
    return [*content, draw.choice(content)] if content else content
