"""FakeShard: one rank without a model, scriptable and deterministic, for tests and benchmarks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterTiers,
    FetchedAdapter,
    LoadReport,
)
from lorax_contract.constraint import Constraint
from lorax_contract.errors import LoraxError, ShardError, ShardUnavailableError, StaleEpochError
from lorax_contract.step import (
    AdapterHandle,
    RequestId,
    ShardInfo,
    StepOutcome,
    StepPlan,
    WarmupSpec,
)
from lorax_router.shards.fake.batch import FakeBatch
from lorax_router.shards.fake.lane import CommitLane, Reply
from lorax_router.shards.fake.memory import FakeMemory, FakeShardError
from lorax_router.shards.fake.model import FakeModel, expected_tokens

__all__ = ["FakeModel", "FakeShard", "FakeShardError", "expected_tokens", "fake_fetched"]

_FAKE_BYTES = 1 << 20

Result = TypeVar("Result")
Answer: TypeAlias = Result | Awaitable[Result]


async def _answered(answer: Answer[Result]) -> Result:
    """Return what a script says, which may take its time."""
    return await answer if isinstance(answer, Awaitable) else answer


def fake_fetched(query: AdapterQuery) -> FetchedAdapter:
    """Return an adapter whose content is its name."""
    name = str(query.ref)
    return FetchedAdapter(
        version="1",
        part=AdapterPart(f"content of {name}", f"files of {name}"),
        disk_bytes=_FAKE_BYTES,
        device_bytes=_FAKE_BYTES,
        max_rank=8,
        valid_s=300.0,
    )


class FakeShard:
    """Implements ShardClient: executes plans with a paged memory of its own.

    A lost, shared or stale block, a wrong position or a token computed twice either
    changes the output (compare with ``model.expected_tokens``) or raises
    FakeShardError, which is kept in ``violations`` too.

    Like the real client it is bound to the epoch that it first saw: after
    ``restart`` calls are refused until ``reconnect``. Every method of ShardClient
    that changes state takes the caller's epoch, for servers that wrap a FakeShard.

    Args:
        model: what is computed.
        num_blocks: KV blocks that warm-up reports, unless its spec allows fewer.
        block_size: tokens per block.
        rank, world_size: of its group; rank 0 answers for all.
        epoch: the incarnation it belongs to.
        max_depth: how many commit calls may be unanswered at once.
        max_positions: longest sequence; 0: unbounded.
        step_delay_s: seconds that a step takes, or a function of its plan.
        adapter_delay_s: seconds that preparing an adapter takes.
        facts: what ShardInfo has besides, such as the model's head.
    """

    def __init__(
        self,
        model: FakeModel | None = None,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 1,
        max_depth: int = 2,
        max_positions: int = 0,
        step_delay_s: float | Callable[[StepPlan], float] = 0.0,
        adapter_delay_s: float = 0.0,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model or FakeModel()
        self.rank = rank
        self.step_delay_s = step_delay_s
        self.adapter_delay_s = adapter_delay_s
        self.fetch_delay_s = 0.0
        # What fetching answers, instead of an adapter for every name.
        self.on_fetch: Callable[[AdapterQuery], Answer[FetchedAdapter]] | None = None
        # Called before an adapter is taken in or forgotten; what it raises is the answer.
        self.on_prepare: Callable[[AdapterHandle, AdapterContent], Answer[None]] | None = None
        self.on_release: Callable[[AdapterHandle, Sequence[AdapterPart]], None] | None = None
        # Called before a constraint is ready; what it raises is the answer. FakeShard's outputs
        # are bound to none.
        self.on_constraint: Callable[[Constraint], Answer[None]] | None = None
        self.constraints: list[Constraint] = []
        self.queries: list[AdapterQuery] = []
        # Tokenizer and template files by store digest.
        self.texts: dict[str, dict[str, bytes]] = {}
        self.steps: list[StepPlan] = []
        self.violations: list[FakeShardError] = []
        self._num_blocks = num_blocks
        self._info = ShardInfo(
            epoch=epoch,
            world_size=world_size,
            model_type="fake",
            dtype="float32",
            device_type="cpu",
            block_size=block_size,
            vocab_size=self.model.vocab_size,
            max_positions=max_positions,
            num_blocks=0,
            max_depth=max_depth,
            lora_backend="fake",
            adapter_bytes=1 << 30,
            **(facts or {}),
        )
        # Classification heads, of the model ("") and of adapters by content digest.
        self.heads = {} if self._info.head is None else {"": self._info.head}
        self._bound_epoch: int | None = None
        self._dead = False
        self._end = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()
        self._failing_steps: dict[int, LoraxError] = {}
        self._failing_rows: dict[RequestId, tuple[int, str]] = {}
        self._error_codes: dict[RequestId, str] = {}
        self._harmful_rows: set[RequestId] = set()
        self._failing_adapters: dict[AdapterHandle, LoraxError] = {}
        self._failing_activations: dict[AdapterHandle, str] = {}
        self._dies_at: int | None = None
        self._reset()

    def _reset(self) -> None:
        """Start empty: no rows, no adapters, the first sequence number is awaited."""
        self._make_batch(self._num_blocks)
        self._prepared: dict[AdapterHandle, str] = {}
        self._used_handles: dict[AdapterHandle, str] = {}
        self._host: dict[str, int] = {}
        self._disk: dict[str, int] = {}
        self._lane = CommitLane(self._info.max_depth)

    def _make_batch(self, num_blocks: int) -> None:
        info = self._info
        memory = FakeMemory(num_blocks, info.block_size)
        self.batch = FakeBatch(self.model, memory, rank=self.rank)
        self.batch.heads = self.heads

    # --- script -----------------------------------------------------------------

    def hold(self) -> None:
        """Make steps wait, from the next one that begins, until ``let_go``."""
        self._open.clear()

    def let_go(self) -> None:
        """Let steps run again."""
        self._open.set()

    async def arrived(self, seq: int) -> None:
        """Wait until the commit call with this sequence number has arrived."""
        await self._lane.arrived(seq)

    def fail_step(self, seq: int, error: LoraxError) -> None:
        """Make a step end in ``error`` before it does anything."""
        self._failing_steps[seq] = error

    def fail_row(
        self, request_id: RequestId, text: str, *, from_seq: int = 0, code: str = "generation"
    ) -> None:
        """Make a row end in an error in the first step from ``from_seq`` on that computes it."""
        self._failing_rows[request_id] = (from_seq, text)
        self._error_codes[request_id] = code

    def fail_passes(self, request_id: RequestId) -> None:
        """Make each forward pass fail that a row is in."""
        self._harmful_rows.add(request_id)

    def fail_adapter(self, handle: AdapterHandle, error: LoraxError) -> None:
        """Make preparing an adapter end in ``error``."""
        self._failing_adapters[handle] = error

    def fail_activation(self, handle: AdapterHandle, text: str | None) -> None:
        """Keep an adapter from taking effect when a step is to activate it; None: no more."""
        if text is None:
            self._failing_activations.pop(handle, None)
        else:
            self._failing_activations[handle] = text

    def die(self, *, at_seq: int | None = None) -> None:
        """Be gone: now, or when the step ``at_seq`` is to run. Calls in flight fail too."""
        if at_seq is not None:
            self._dies_at = at_seq
            return
        self._dead = True
        self._end.set()
        self._lane.cancel()

    def restart(self, epoch: int | None = None) -> None:
        """Come back empty under another epoch (the next one if None)."""
        self.die()
        self._dead = False
        self._end = asyncio.Event()
        self._dies_at = None
        self._info = replace(self._info, epoch=epoch or self._info.epoch + 1, num_blocks=0)
        self._reset()

    def reconnect(self) -> None:
        """Do what connecting anew does: the calls from here on name the present epoch."""
        self._bound_epoch = None

    @property
    def prepared(self) -> dict[AdapterHandle, str]:
        """The prepared adapters and their digests."""
        return dict(self._prepared)

    @property
    def epoch(self) -> int:
        """The incarnation that answers now."""
        return self._info.epoch

    # --- ShardClient ------------------------------------------------------------

    async def info(self) -> ShardInfo:
        """Return what the shard is; ``num_blocks`` is 0 before warm-up."""
        self._check(self._info.epoch)
        if self._bound_epoch is None:
            self._bound_epoch = self._info.epoch
        return self._info

    async def warmup(self, spec: WarmupSpec, epoch: int | None = None) -> int:
        """Make the pool anew, empty, and return its number of blocks."""
        self._check(epoch)
        if self.batch.num_resident:
            raise ShardError("warm-up must come before the first row")
        num_blocks = min(self._num_blocks, spec.max_blocks or self._num_blocks)
        self._make_batch(num_blocks)
        self._info = replace(self._info, num_blocks=num_blocks)
        return num_blocks

    async def step(self, plan: StepPlan, epoch: int | None = None) -> StepOutcome:
        """Execute one step in its turn; a repeated ``plan.seq`` gets the stored outcome."""
        self._check(epoch)
        try:
            outcome = await self._lane.run(plan.seq, partial(self._run_step, plan))
            if outcome is None:
                raise FakeShardError(f"sequence number {plan.seq} was used to clear")
        except FakeShardError as error:
            if error not in self.violations:
                self.violations.append(error)
            raise
        return outcome

    async def clear(self, seq: int, epoch: int | None = None) -> None:
        """Drop all rows, in turn."""
        self._check(epoch)
        await self._lane.run(seq, partial(self._run_clear, seq))

    async def take_over(self, epoch: int) -> None:
        """Begin a later epoch, as empty as after a start; what was fetched stays."""
        self._check(self._info.epoch)
        if epoch <= self._info.epoch:
            raise StaleEpochError(f"epoch {epoch} cannot begin: this is epoch {self._info.epoch}")
        self._lane.cancel()
        host, disk = self._host, self._disk
        self._reset()
        self._host, self._disk = host, disk
        self._info = replace(self._info, epoch=epoch)
        self._bound_epoch = epoch

    async def fetch_adapter(self, query: AdapterQuery) -> FetchedAdapter:
        """Answer for any name; what ``on_fetch`` returns or raises, if it is set."""
        self._check(None)
        self.queries.append(query)
        if self.fetch_delay_s:
            await asyncio.sleep(self.fetch_delay_s)
            self._check(None)
        fetched = fake_fetched(query)
        if self.on_fetch is not None:
            fetched = await _answered(self.on_fetch(query))
        if fetched.head is not None:
            self.heads[fetched.part.content_digest] = fetched.head
        return fetched

    async def adapter_text(self, store_digest: str, names: Sequence[str]) -> dict[str, bytes]:
        """Return those of the files that ``texts`` has for an adapter."""
        self._check(None)
        files = self.texts.get(store_digest, {})
        return {name: files[name] for name in names if name in files}

    async def prepare_adapter(
        self, handle: AdapterHandle, content: AdapterContent, epoch: int | None = None
    ) -> LoadReport:
        """Take an adapter in; a handle that named another content in this epoch is refused."""
        self._check(epoch)
        digest = content.key
        if self._used_handles.setdefault(handle, digest) != digest:
            raise ShardError(
                f"adapter handle {handle} named {self._used_handles[handle]!r}; use a new handle"
            )
        if self.adapter_delay_s:
            await asyncio.sleep(self.adapter_delay_s)
            self._check(epoch)
        if self.on_prepare is not None:
            await _answered(self.on_prepare(handle, content))
        if handle in self._failing_adapters:
            raise self._failing_adapters[handle]
        self._prepared[handle] = digest
        self._host.update((part.content_digest, _FAKE_BYTES) for part in content.parts)
        self._disk.update((part.store_digest, _FAKE_BYTES) for part in content.parts)
        return LoadReport(device_bytes=_FAKE_BYTES)

    async def release_adapter(
        self,
        handle: AdapterHandle,
        forget: Sequence[AdapterPart] = (),
        epoch: int | None = None,
    ) -> None:
        """Forget an adapter; one that was never prepared is no error, an active one is."""
        self._check(epoch)
        if handle in self.batch.active:
            raise ShardError(f"adapter {handle} is active; deactivate it in a step first")
        if self.on_release is not None:
            self.on_release(handle, forget)
        self._prepared.pop(handle, None)
        for part in forget:
            self._host.pop(part.content_digest, None)
            self._disk.pop(part.store_digest, None)

    async def prepare_constraint(
        self, constraint: Constraint, content: AdapterContent | None = None
    ) -> None:
        """Take note of a constraint; what ``on_constraint`` raises refuses it."""
        self._check(None)
        self.constraints.append(constraint)
        if self.on_constraint is not None:
            await _answered(self.on_constraint(constraint))

    async def adapter_tiers(self, parts: Sequence[AdapterPart]) -> AdapterTiers:
        """Return the prepared adapters; host and disk have all that was not forgotten since."""
        self._check(None)
        device = {handle: (digest, _FAKE_BYTES) for handle, digest in self._prepared.items()}
        host = {part.content_digest for part in parts} & self._host.keys()
        disk = {part.store_digest for part in parts} & self._disk.keys()
        return AdapterTiers(
            device=device,
            host={digest: self._host[digest] for digest in host},
            disk={digest: self._disk[digest] for digest in disk},
        )

    async def health(self) -> None:
        """Return unless dead."""
        self._check(self._info.epoch)

    async def lost(self) -> ShardError:
        """Return once this incarnation is gone."""
        await self._end.wait()
        return ShardUnavailableError("the fake shard is gone")

    async def close(self) -> None:
        """Stop everything that still runs."""
        await self._lane.stop()

    # --- the commit lane --------------------------------------------------------

    def _check(self, epoch: int | None) -> None:
        if self._dead:
            raise ShardUnavailableError(f"rank {self.rank} is dead")
        if epoch is None:
            if self._bound_epoch is None:
                self._bound_epoch = self._info.epoch
            epoch = self._bound_epoch
        if epoch != self._info.epoch:
            raise StaleEpochError(f"epoch {epoch} is over, this is epoch {self._info.epoch}")

    async def _run_step(self, plan: StepPlan) -> Reply:
        delay = self.step_delay_s
        await self._begin(plan.seq, delay(plan) if callable(delay) else delay)
        self.steps.append(plan)
        failing = {
            request_id: text
            for request_id, (from_seq, text) in self._failing_rows.items()
            if plan.seq >= from_seq
        }
        outcome = self.batch.execute(
            plan, self._prepared, failing, self._failing_activations, self._harmful_rows
        )
        for request_id, code in self._error_codes.items():
            if (detail := outcome.details.get(request_id)) is not None and detail.error_text:
                detail.error_code = code
        return outcome

    async def _run_clear(self, seq: int) -> Reply:
        await self._begin(seq, 0.0)
        self.batch.clear()
        return None

    async def _begin(self, seq: int, delay_s: float) -> None:
        """Wait as the script says, then end the call if the script wants that."""
        if not self._open.is_set():
            await self._open.wait()
        if delay_s:
            await asyncio.sleep(delay_s)
        if self._dies_at == seq:
            self._dead = True
        self._check(self._info.epoch)
        if seq in self._failing_steps:
            raise self._failing_steps[seq]
