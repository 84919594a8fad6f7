"""Constraints that are made ready beside the steps, before a row is bound to them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from lorax_contract.adapters import AdapterUnavailableError
from lorax_contract.constraint import Constraint
from lorax_contract.errors import ValidationError
from lorax_proto import generate_pb2 as pb
from lorax_proto.convert import constraint_from_proto
from lorax_proto.convert_adapters import failure_to_proto
from lorax_shard.adapters.rank_adapters import RankAdapters, give_way
from lorax_shard.constraints.tokens import OwnTokens
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.row_entry import UNBOUND
from lorax_shard.rpc.adapter_calls import given_content

# Grammars that are compiled at the same time; more would only take the steps' cores.
_NUM_THREADS = 2


class ConstraintCalls:
    """Answers for rank 0; the others draw nothing, so for them each constraint is ready."""

    def __init__(self, engine: Engine, rank_adapters: RankAdapters | None, *, rank: int) -> None:
        self._engine = engine
        self._rank_adapters = rank_adapters
        self._rank = rank
        self._threads = ThreadPoolExecutor(
            _NUM_THREADS, thread_name_prefix="constraints", initializer=give_way
        )

    async def prepare(self, request: pb.PrepareConstraintRequest) -> pb.PrepareConstraintResponse:
        """Compile a constraint for the tokens of a request's adapter, or say why that fails."""
        if self._rank:
            return pb.PrepareConstraintResponse()
        try:
            own = await self._own_tokens(request) if request.HasField("content") else None
            await self.compile(constraint_from_proto(request.constraint), own)
        except ValidationError as error:
            return pb.PrepareConstraintResponse(refusal=str(error))
        except AdapterUnavailableError as error:
            return pb.PrepareConstraintResponse(failure=failure_to_proto(error))
        return pb.PrepareConstraintResponse()

    async def compile(self, constraint: Constraint, own: OwnTokens | None = None) -> None:
        """Compile a constraint in a thread that gives way to steps; raises ValidationError."""
        constraints = self._engine.constraints
        if constraints is None:
            raise ValidationError(UNBOUND)
        work = partial(constraints.prepare, constraint, own)
        await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _own_tokens(self, request: pb.PrepareConstraintRequest) -> OwnTokens | None:
        if self._rank_adapters is None:
            return None
        content = given_content(request.content)
        vocabulary, vocab_size = await self._rank_adapters.tokens(content)
        if vocabulary is None:
            return None
        model = self._engine.model
        ends = model.eos_token_ids | frozenset(vocabulary.end_ids.tolist())
        return OwnTokens(vocabulary, vocab_size or model.vocab_size, ends)
