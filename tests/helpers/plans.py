"""Short ways to make requests and to drive a shard client with a scheduler."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterable, Sequence

from lorax_contract.step import (
    AdapterHandle,
    FinishCode,
    NewRow,
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepPlan,
    StoppingParams,
)
from lorax_router.core.ports import ShardClient
from lorax_router.core.scheduler import Scheduler


def make_spec(
    request_id: int,
    prompt: Sequence[int] = (11, 12, 13),
    *,
    max_new_tokens: int = 5,
    min_new_tokens: int = 0,
    adapter: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    stop_sequences: tuple[str, ...] = (),
    ignore_eos: bool = False,
    **sampling: object,
) -> RequestSpec:
    """Return a request; further keywords are sampling parameters.

    With ``max_new_tokens`` 0 nothing is asked for beyond the prompt.
    """
    return RequestSpec(
        request_id=RequestId(request_id),
        prompt_ids=list(prompt),
        sampling=SamplingParams(**sampling),
        stopping=StoppingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop_token_ids=stop_token_ids,
            stop_sequences=stop_sequences,
            ignore_eos=ignore_eos,
        ),
        adapter=AdapterHandle(adapter),
        output=OutputKind.TOKENS if max_new_tokens else OutputKind.PROMPT,
    )


def make_plan(
    seq: int,
    rows: Iterable[tuple[int, int, list[int]]] = (),
    new: Iterable[RequestSpec | NewRow] = (),
    **rest: object,
) -> StepPlan:
    """Return a plan of rows (request id, number of tokens, new blocks)."""
    rows = list(rows)
    return StepPlan(
        seq=seq,
        row_ids=[request_id for request_id, _, _ in rows],
        num_tokens=[num for _, num, _ in rows],
        num_new_blocks=[len(blocks) for _, _, blocks in rows],
        new_blocks=[block for _, _, blocks in rows for block in blocks],
        new_rows=[each if isinstance(each, NewRow) else NewRow(each, []) for each in new],
        **rest,
    )


def random_specs(seed: int, count: int, *, vocab_size: int = 1000) -> list[RequestSpec]:
    """Return requests of mixed lengths, half of them drawn with a seed."""
    rng = random.Random(seed)
    return [
        make_spec(
            request_id,
            [rng.randrange(vocab_size) for _ in range(rng.randint(1, 30))],
            max_new_tokens=rng.randint(1, 25),
            do_sample=rng.random() < 0.5,
            seed=rng.getrandbits(64),
        )
        for request_id in range(1, count + 1)
    ]


async def drive(
    client: ShardClient, scheduler: Scheduler, specs: Iterable[RequestSpec]
) -> dict[RequestId, list[int]]:
    """Run requests to their end and return the tokens of each."""
    output: dict[RequestId, list[int]] = {}
    finished: dict[RequestId, int] = {}
    for spec in specs:
        scheduler.submit(spec, 0.0)
        output[spec.request_id] = []
    in_flight: deque[asyncio.Task] = deque()
    while not scheduler.is_idle:
        while (plan := scheduler.plan(0.0)) is not None:
            in_flight.append(asyncio.create_task(client.step(plan)))
            await asyncio.sleep(0)
        outcome = await in_flight.popleft()
        accepted = scheduler.apply(outcome, 0.0)
        start = 0
        for row_id, num, finish, counts in zip(
            outcome.row_ids, outcome.num_tokens, outcome.finish, accepted, strict=True
        ):
            if counts:
                output[row_id] += outcome.tokens.ids[start : start + num]
                finished[row_id] = finish
            start += num
        scheduler.check()
    assert all(finish != FinishCode.RUNNING for finish in finished.values())
    return output
