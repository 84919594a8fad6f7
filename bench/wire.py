"""What a step of many rows costs on the wire: our columns against LoRAX's nested messages.

    python bench/wire.py [rows]

Times are medians per step, in milliseconds, of one decode step without new rows.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc.aio

from lorax_bench.steps.wire import make_outcome, make_plan
from lorax_contract.step import StepOutcome
from lorax_proto import generate_pb2 as pb
from lorax_proto import generate_pb2_grpc as pb_grpc
from lorax_proto.convert import (
    outcome_from_proto,
    outcome_to_proto,
    step_from_proto,
    step_to_proto,
)
from lorax_router.shards.grpc_client import GrpcShardClient

REPEATS = 300


def nested_to_proto(outcome: StepOutcome) -> pb.DecodeResponse:
    """Return the reply as LoRAX's shards build it: one Generation per row."""
    tokens = outcome.tokens
    generations = [
        pb.Generation(
            request_id=row_id,
            next_tokens=pb.NextTokens(
                ids=[token], logprobs=[logprob], texts=[text], is_special=[special]
            ),
        )
        for row_id, token, logprob, text, special in zip(
            outcome.row_ids, tokens.ids, tokens.logprobs, tokens.texts, tokens.special, strict=True
        )
    ]
    return pb.DecodeResponse(generations=generations)


def nested_from_proto(message: pb.DecodeResponse) -> list[tuple[Any, ...]]:
    """Return what a router reads from a nested reply."""
    return [
        (
            generation.request_id,
            generation.next_tokens.ids[0],
            generation.next_tokens.logprobs[0],
            generation.next_tokens.texts[0],
            generation.next_tokens.is_special[0],
            generation.HasField("generated_text"),
        )
        for generation in message.generations
    ]


def median_ms(call: Callable[[], object]) -> float:
    """Return the median time of one call."""
    times = []
    for _ in range(REPEATS):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return 1000 * statistics.median(times)


def print_line(name: str, milliseconds: float, note: str = "") -> None:
    """Print one figure."""
    print(f"{name:<46} {milliseconds:8.3f} ms  {note}")


def bench_conversion(num_rows: int) -> None:
    """Print what each half of each conversion costs, serialization included."""
    plan = make_plan(num_rows)
    outcome = make_outcome(plan)
    request = step_to_proto(plan, 1).SerializeToString()
    columns = outcome_to_proto(outcome, pb.DecodeResponse).SerializeToString()
    nested = nested_to_proto(outcome).SerializeToString()
    parse = pb.DecodeResponse.FromString
    write_plan = median_ms(lambda: step_to_proto(plan, 1).SerializeToString())
    read_plan = median_ms(lambda: step_from_proto(pb.DecodeRequest.FromString(request)))
    write = median_ms(lambda: outcome_to_proto(outcome, pb.DecodeResponse).SerializeToString())
    read = median_ms(lambda: outcome_from_proto(parse(columns), plan.seq))
    write_nested = median_ms(lambda: nested_to_proto(outcome).SerializeToString())
    read_nested = median_ms(lambda: nested_from_proto(parse(nested)))
    print_line("router writes the plan", write_plan, f"{len(request)} bytes")
    print_line("shard reads the plan", read_plan)
    print_line("shard writes the outcome, columns", write, f"{len(columns)} bytes")
    print_line("router reads the outcome, columns", read)
    print_line("shard writes the outcome, nested", write_nested, f"{len(nested)} bytes")
    print_line("router reads the outcome, nested", read_nested)
    print_line("router's share: plan and outcome, columns", write_plan + read)


class Echo(pb_grpc.LoraxServiceServicer):
    """Answers each step at once with the same outcome."""

    def __init__(self, outcome: StepOutcome) -> None:
        self._reply = outcome_to_proto(outcome, pb.DecodeResponse)

    async def Info(self, request: Any, context: Any) -> pb.InfoResponse:  # noqa: N802
        """Name an epoch."""
        return pb.InfoResponse(epoch=1)

    async def Decode(self, request: Any, context: Any) -> pb.DecodeResponse:  # noqa: N802
        """Answer a step."""
        return self._reply


async def bench_round_trip(num_rows: int) -> None:
    """Print how long a step takes through gRPC when the shard does nothing."""
    plan = make_plan(num_rows)
    server = grpc.aio.server()
    servicer = Echo(make_outcome(plan))
    # The generated function has no types.
    pb_grpc.add_LoraxServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        uri = f"unix:{Path(folder) / 'shard'}"
        server.add_insecure_port(uri)
        await server.start()
        client = GrpcShardClient(uri)
        times = []
        for _ in range(REPEATS):
            start = perf_counter()
            await client.step(plan)
            times.append(perf_counter() - start)
        await client.close()
        await server.stop(None)
    note = "client and server share one event loop"
    print_line("round trip over a unix socket", 1000 * statistics.median(times), note)


def main() -> None:
    """Run all measurements."""
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    print(f"one decode step of {num_rows} rows")
    bench_conversion(num_rows)
    asyncio.run(bench_round_trip(num_rows))


if __name__ == "__main__":
    main()
