"""What goes onto the wire comes back: round trips over seeded random values."""

from __future__ import annotations

import random
import string
import struct
from dataclasses import replace
from typing import Any

import pytest

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.step import (
    UNSAMPLED,
    Alternatives,
    BlockCopy,
    FinishCode,
    LogitBias,
    NewRow,
    OutputKind,
    RequestSpec,
    RowDetail,
    SamplingParams,
    ShardInfo,
    StepOutcome,
    StepPlan,
    StoppingParams,
    TokenColumns,
    WarmupSpec,
)
from lorax_contract.tracing import TraceContext
from lorax_proto import generate_pb2 as pb
from lorax_proto.convert import (
    info_from_proto,
    info_to_proto,
    new_row_from_proto,
    new_row_to_proto,
    outcome_from_proto,
    outcome_to_proto,
    step_from_proto,
    step_to_proto,
    tokens_from_proto,
    tokens_to_proto,
    warmup_from_proto,
    warmup_to_proto,
)


class Values:
    """Random values of the contract; floats are such that single precision holds them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def id32(self) -> int:
        return self.rng.choice([0, 1, 2**32 - 1, self.rng.getrandbits(32)])

    def id64(self) -> int:
        return self.rng.choice([1, 2**64 - 1, self.rng.getrandbits(64)])

    def real(self) -> float:
        return struct.unpack("f", struct.pack("f", self.rng.uniform(-30, 30)))[0]

    def text(self) -> str:
        letters = string.printable + "äß€漢字🙂\0"
        return "".join(self.rng.choice(letters) for _ in range(self.rng.randint(0, 8)))

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def some(self, make: Any, most: int = 5) -> list[Any]:
        return [make() for _ in range(self.rng.randint(0, most))]

    def maybe(self, make: Any) -> Any:
        return make() if self.flag() else None

    def spec(self) -> RequestSpec:
        ids = self.some(self.id32)
        sampling = SamplingParams(
            do_sample=self.flag(),
            temperature=self.real(),
            top_k=self.id32(),
            top_p=self.real(),
            typical_p=self.real(),
            min_p=self.real(),
            repetition_penalty=self.real(),
            frequency_penalty=self.real(),
            presence_penalty=self.real(),
            seed=self.id64(),
            logit_bias=LogitBias(tuple(ids), tuple(self.real() for _ in ids)),
            watermark=self.flag(),
            num_alternatives=self.id32(),
            raw_logprobs=self.flag(),
            prompt_logprobs=self.flag(),
            num_prompt_alternatives=self.id32(),
        )
        stopping = StoppingParams(
            max_new_tokens=self.id32(),
            min_new_tokens=self.id32(),
            stop_sequences=tuple(self.some(self.text)),
            stop_token_ids=tuple(self.some(self.id32)),
            ignore_eos=self.flag(),
        )
        return RequestSpec(
            request_id=self.id64(),
            prompt_ids=self.some(self.id32, 20),
            sampling=sampling,
            stopping=stopping,
            adapter=self.id32(),
            adapter_start=self.maybe(self.id32),
            output=self.rng.choice(list(OutputKind)),
            constraint=self.maybe(self.constraint),
            trace=self.maybe(self.trace),
        )

    def trace(self) -> TraceContext:
        ids = f"{self.id64():032x}", f"{self.id64():016x}"
        return TraceContext(*ids, is_sampled=self.flag(), state=self.rng.choice(["", "a=1,b=2"]))

    def constraint(self) -> Constraint:
        return Constraint(kind=self.rng.choice(list(ConstraintKind)), text=self.text())

    def plan(self) -> StepPlan:
        blocks = [self.rng.randint(0, 3) for _ in range(self.rng.randint(0, 9))]
        return StepPlan(
            seq=self.id64(),
            row_ids=[self.id64() for _ in blocks],
            num_tokens=[self.id32() for _ in blocks],
            num_new_blocks=blocks,
            new_blocks=[self.id32() for _ in range(sum(blocks))],
            new_rows=self.some(lambda: NewRow(self.spec(), self.some(self.id32))),
            drop=self.some(self.id64),
            activate=self.some(self.id32),
            deactivate=self.some(self.id32),
            copies=self.some(
                lambda: BlockCopy(
                    self.rng.randint(0, 1), self.id32(), self.rng.randint(0, 1), self.id32()
                )
            ),
        )

    def columns(self, count: int) -> TokenColumns:
        return TokenColumns(
            [self.id32() for _ in range(count)],
            [self.real() for _ in range(count)],
            [self.text() for _ in range(count)],
            [self.flag() for _ in range(count)],
        )

    def alternatives(self) -> Alternatives:
        count = self.rng.randint(0, 3)
        columns = self.columns(count)
        return Alternatives(columns.ids, columns.logprobs, columns.texts)

    def detail(self) -> RowDetail:
        prompt = self.maybe(lambda: self.columns(3))
        return RowDetail(
            generated_text=self.maybe(self.text),
            alternatives=self.some(self.alternatives),
            prompt_tokens=prompt,
            prompt_alternatives=self.some(self.alternatives) if prompt else [],
            error_code=self.maybe(self.text),
            error_text=self.maybe(self.text),
        )

    def outcome(self) -> StepOutcome:
        counts = [self.rng.randint(0, 3) for _ in range(self.rng.randint(0, 9))]
        row_ids = [self.id64() for _ in counts]
        return StepOutcome(
            seq=self.id64(),
            row_ids=row_ids,
            num_tokens=counts,
            finish=[int(self.rng.choice(list(FinishCode))) for _ in counts],
            tokens=self.columns(sum(counts)),
            details={row: self.detail() for row in row_ids if self.flag()},
            inactive={self.id32(): self.text() for _ in range(self.rng.randint(0, 2))},
            num_drafted=self.id32(),
            drafted={row: self.id32() for row in row_ids if self.flag()},
            failed=self.some(self.id64),
            failure=self.text(),
            forward_ns=self.id64(),
            total_ns=self.id64(),
        )

    def info(self) -> ShardInfo:
        return ShardInfo(
            epoch=self.id64(),
            world_size=self.id32(),
            model_type=self.text(),
            dtype=self.text(),
            device_type=self.text(),
            block_size=self.id32(),
            vocab_size=self.id32(),
            max_positions=self.id32(),
            num_blocks=self.id32(),
            max_depth=self.id32(),
            window_size=self.maybe(self.id32),
            attention_backend=self.text(),
            linear_backend=self.text(),
            elementwise_backend=self.text(),
            lora_backend=self.text(),
            adapter_bytes=self.id64(),
            memory=tuple(self.some(lambda: (self.text(), self.id64()))),
            shard_uris=tuple(self.some(self.text)),
        )


@pytest.fixture(params=range(25))
def values(request: pytest.FixtureRequest) -> Values:
    return Values(request.param)


def wired(message: Any) -> Any:
    """Return the message as the other end parses it."""
    return type(message).FromString(message.SerializeToString())


def test_a_plan_comes_back(values):
    plan, epoch = values.plan(), values.id64()
    message = wired(step_to_proto(plan, epoch))
    assert isinstance(message, pb.PrefillRequest if plan.new_rows else pb.DecodeRequest)
    assert message.epoch == epoch
    assert message.HasField("step")
    assert step_from_proto(message) == plan


@pytest.mark.parametrize("reply_type", [pb.PrefillResponse, pb.DecodeResponse])
def test_an_outcome_comes_back(values, reply_type):
    outcome = values.outcome()
    message = wired(outcome_to_proto(outcome, reply_type))
    assert isinstance(message, reply_type)
    assert outcome_from_proto(message, outcome.seq) == outcome


def test_info_comes_back(values):
    info = values.info()
    message = wired(info_to_proto(info, rank=3))
    assert message.rank == 3
    assert info_from_proto(message, info.shard_uris) == info


def test_warmup_comes_back(values):
    rng = values.rng
    spec = WarmupSpec(
        max_input_length=rng.randint(1, 1000),
        max_total_tokens=rng.randint(1000, 2000),
        max_step_tokens=values.id32(),
        max_rows=values.id32(),
        max_blocks=values.id32(),
        required_tokens=values.id32(),
    )
    message = wired(warmup_to_proto(spec, 9))
    assert (message.epoch, warmup_from_proto(message)) == (9, spec)


def test_token_columns_come_back(values):
    columns = values.columns(4)
    assert tokens_from_proto(wired(tokens_to_proto(columns))) == columns


def test_a_request_without_our_fields_is_all_prompt():
    request = pb.Request(id=4, tokenized_inputs=pb.TokenizedInputs(ids=[1, 2, 3]))
    row = new_row_from_proto(request)
    assert (list(row.spec.prompt_ids), list(row.output_ids)) == ([1, 2, 3], [])


def test_no_sampling_is_sent_where_nothing_is_drawn():
    row = NewRow(replace(Values(3).spec(), sampling=UNSAMPLED), [])
    message = wired(new_row_to_proto(row))
    assert not message.HasField("parameters")
    assert new_row_from_proto(message).spec.sampling is UNSAMPLED


def test_values_that_are_lists_come_back_as_lists_of_their_own():
    plan = Values(3).plan()
    message = step_to_proto(plan, 1)
    back = step_from_proto(message)
    back.row_ids.append(77)
    assert 77 not in message.step.row_ids
    assert type(back.num_tokens) is list


def test_a_seed_that_does_not_fit_is_refused():
    spec = Values(1).spec()
    bad = RequestSpec(
        request_id=spec.request_id,
        prompt_ids=[1],
        sampling=SamplingParams(seed=2**64),
        stopping=spec.stopping,
    )
    with pytest.raises(ValueError, match=r"out of range|[Rr]ange"):
        step_to_proto(StepPlan(1, new_rows=[NewRow(bad, [])]), 1)
