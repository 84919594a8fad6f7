"""What of a step goes to rows that decode, to prompts, and to those that wait."""

from __future__ import annotations

from operator import attrgetter

from lorax_router.core.admission import Admission
from lorax_router.core.isolation import Isolation
from lorax_router.core.placed_ahead import PlacedAhead
from lorax_router.core.request import RequestState, Status
from lorax_router.core.running import RunningRows
from lorax_router.core.step_builder import StepBuilder
from lorax_router.core.suspects import Suspects

# Steps of prompts alone, one after the other, while somebody waits for the next token.
MAX_PROMPT_STEPS = 32
# And steps for which patient prompts wait for an urgent one that waits itself.
MAX_HELD_STEPS = 4

_last_step_of = attrgetter("last_step")


class StepComposer:
    """Puts rows into a step, in the order that ``batching`` names. Owned by the Scheduler.

    ``mixed``
        Each row that decodes has its token, prompts share what is left.
    ``prefill``
        Prompts have steps of their own, and decodes wait while there are any: for at most
        MAX_PROMPT_STEPS.
    ``decode``
        Decodes have steps of their own, and prompts wait while there are any: for at most
        ``max_waiting_tokens`` steps, then they have one.

    Where prompts meet, those that fit into the step are *short* and the others *long*. Long
    ones have half of what prompts get, and all that the short ones leave: so short ones
    slip past, and a long one takes at most twice its time.

    Prompts that are *patient* have PATIENT_PART of a step, and none of every other one in which
    there are urgent ones: so what an urgent one waits for is soon over.

    Where reads are limited and do not suffice for all rows, they take turns: whoever was
    computed longest ago comes first, and the first row of a step may read any number.
    """

    def __init__(
        self,
        running: RunningRows,
        admission: Admission,
        *,
        block_size: int,
        batching: str,
        max_waiting_tokens: int,
        limits_reads: bool,
        num_ahead: int,
        suspects: Suspects,
        isolation: Isolation,
    ) -> None:
        self._running = running
        self._suspects = suspects
        self._isolation = isolation
        # Whether the latest step was one of suspects.
        self._was_of_suspects = False
        self._admission = admission
        self._block_size = block_size
        self._batching = batching
        self._max_decode_steps = max_waiting_tokens
        self._limits_reads = limits_reads
        # Tokens that a row may compute beyond what is planned, by the end of what is in flight.
        self._num_ahead = num_ahead
        # Steps of one kind since the last one of the other.
        self._num_prompt_steps = self._num_decode_steps = 0
        # Whether patient prompts wait in this step; for how many they did, the most after one that
        # had an urgent prompt.
        self._holds_patient = False
        self._num_held = 0
        # What prompts could have had of the latest step that had any.
        self.prompt_limit = 0

    def compose(self, builder: StepBuilder, *, is_clear: bool) -> None:
        """Put rows into a step: suspects, or others; in turns, so that these wait for one such step.

        ``is_clear``: no step is in flight. Before all others come those that must be alone.
        """
        if self._isolation.compose(builder, self._admission, is_clear=is_clear):
            return
        self._was_of_suspects = not self._was_of_suspects and self._suspects.place(builder)
        if not self._was_of_suspects:
            self._compose(builder)
            self._was_of_suspects = self._suspects.place(builder)

    def place_ahead(self, builder: StepBuilder) -> PlacedAhead | None:
        """Place the rows that decode, while steps are in flight whose outcome will not change that.

        None, and nobody is placed, where something else than an end might: prompts run, blocks may be
        too few, rows take turns or compute as many tokens as drafts are right, are suspects or alone.
        """
        if self._batching != "mixed" or self._limits_reads or self._num_ahead:
            return None
        if self._suspects or self._isolation:
            return None
        decodes, prompts = _by_need(self._running.requests())
        size = self._block_size
        needs_block = [each.num_scheduled == len(each.blocks) * size for each in decodes]
        if prompts or not decodes or sum(needs_block) > self._running.pool.num_free:
            return None
        return PlacedAhead(builder, decodes, needs_block)

    def complete(self, builder: StepBuilder) -> None:
        """Let those in that wait by now, beside rows that were placed ahead: as ``compose`` does.

        To none of them a row gives way (``Admission.may_displace``).
        """
        self._was_of_suspects = False
        builder.is_paced = bool(builder.rows)
        self._make_place(builder, [])
        builder.grant()
        if self._admission.num_waiting:
            self._place_prompts(builder, [], self._running.num_preemptions)
        self._count_held(builder)

    def _compose(self, builder: StepBuilder) -> None:
        rows = self._running.requests()
        if self._suspects:
            rows = [each for each in rows if not each.is_suspect]
        if self._limits_reads:
            rows.sort(key=_last_step_of)
        decodes, prompts = _by_need(rows)
        builder.is_paced = bool(decodes)
        if self._batching == "mixed":
            self._make_place(builder, prompts)
            num_preemptions = self._running.num_preemptions
            self._place_overdue(builder, decodes, prompts)
            self._place_decodes(builder, decodes)
            self._place_prompts(builder, prompts, num_preemptions)
        else:
            self._place_in_turns(builder, decodes, prompts)
        self._count_held(builder)

    def _count_held(self, builder: StepBuilder) -> None:
        """Count the steps for which patient prompts wait."""
        if not self._holds_patient:
            self._num_held = 0
        else:
            self._num_held = MAX_HELD_STEPS if builder.has_urgent_prompt else self._num_held + 1

    def _make_place(self, builder: StepBuilder, prompts: list[RequestState]) -> None:
        """Make place for the first that waits; patient prompts leave the step to urgent ones.

        Never in two steps that have any, one after the other, and not for long for one that does
        not get into a step: so they are not without for long.
        """
        first = self._admission.make_place(builder, prompts)
        candidates = prompts if first is None else [*prompts, first]
        has_urgent = any(not each.is_patient or each.has_turn for each in candidates)
        self._holds_patient = has_urgent and self._num_held < MAX_HELD_STEPS
        if self._holds_patient:
            builder.patient_budget = 0

    def _place_in_turns(
        self, builder: StepBuilder, decodes: list[RequestState], prompts: list[RequestState]
    ) -> None:
        """Place rows of one kind; the others if there are none that can be computed."""
        prompts_first = not decodes or self._is_turn_of_prompts
        if prompts_first:
            self._make_place(builder, prompts)
        num_preemptions = self._running.num_preemptions
        if not prompts_first:
            self._place_decodes(builder, decodes)
        if not builder.rows:
            self._place_overdue(builder, [], prompts)
            self._place_prompts(builder, prompts, num_preemptions)
        if not builder.rows and prompts_first:
            self._place_decodes(builder, decodes)
        if builder.num_prompt_tokens:
            self._num_prompt_steps += 1
            self._num_decode_steps = 0
        elif builder.rows:
            self._num_decode_steps += 1
            self._num_prompt_steps = 0

    @property
    def _is_turn_of_prompts(self) -> bool:
        """Whether prompts go first although somebody waits for the next token."""
        if self._batching == "prefill":
            return self._num_prompt_steps < MAX_PROMPT_STEPS
        return self._num_decode_steps >= self._max_decode_steps

    # --- decodes --------------------------------------------------------------------

    def _place_decodes(self, builder: StepBuilder, decodes: list[RequestState]) -> None:
        """Give one token to each row that has just one to compute."""
        block_size, limits_reads = self._block_size, self._limits_reads
        may_take_blocks = limits_reads or self._num_ahead > 0
        running = Status.RUNNING
        # Rows in a row that have place for their token: nothing else is asked of them.
        plain: list[RequestState] = []
        for request in decodes:
            if request.status is not running:
                continue  # gave way in this very step
            needs_block = request.num_scheduled == len(request.blocks) * block_size
            if not (needs_block or may_take_blocks):
                plain.append(request)
                continue
            builder.decode(plain)
            plain.clear()
            if limits_reads and not builder.may_read(request.num_scheduled + 1):
                continue
            if needs_block and not self._make_room(request, builder):
                builder.is_stalled = True
            else:
                builder.place(request, 1, self._ahead(request))
        builder.decode(plain)

    def _ahead(self, request: RequestState) -> int:
        """Return for how many more tokens a row has blocks beforehand: of those that nobody needs."""
        if not self._num_ahead or self._running.pool.num_free <= 2 * len(self._running):
            return 0
        return max(0, min(self._num_ahead, request.num_kv_tokens - request.num_scheduled - 1))

    # --- prompts --------------------------------------------------------------------

    def _place_overdue(
        self, builder: StepBuilder, decodes: list[RequestState], prompts: list[RequestState]
    ) -> None:
        """Place a prompt first if it was computed longest ago of all, where reads are limited."""
        if not (self._limits_reads and prompts):
            return
        if not decodes or prompts[0].last_step < decodes[0].last_step:
            builder.reserved = len(decodes)
            self._place_chunk(builder, prompts[0], builder.chunk(prompts[0]))
            builder.reserved = 0

    def _place_prompts(
        self, builder: StepBuilder, prompts: list[RequestState], num_preemptions: int
    ) -> None:
        """Let running prompts and those that wait share what is left of a step.

        Nobody is admitted in a step in which a running row stood still or gave way.
        """
        limit = builder.prompt_limit()
        # Some may have given way in this very step.
        prompts = [each for each in prompts if each.status is Status.RUNNING]
        paces = self._batching == "mixed" and builder.may_pace
        short: list[RequestState] = []
        long: list[RequestState] = []
        for request in prompts:
            if request.last_step != builder.plan.seq:
                # What is left of one is not computed all at once either.
                is_long = request.num_to_schedule > limit or (paces and request.is_long)
                (long if is_long else short).append(request)
        if paces:
            builder.pace_long(len(long) + self._admission.num_waiting)
        builder.reserved = self._kept_for_long(builder, long, limit)
        for request in short:
            self._place_chunk(builder, request, builder.chunk(request))
        entering = None
        if not builder.is_stalled and self._running.num_preemptions == num_preemptions:
            entering = self._admission.admit(builder, prompts, long, limit)
        self._place_long(builder, long, entering)
        if builder.num_prompt_tokens:
            self.prompt_limit = limit

    def _kept_for_long(self, builder: StepBuilder, long: list[RequestState], limit: int) -> int:
        """Return what short prompts leave: half, or what long ones may have where that is less."""
        if not long:
            return 0
        may_have = (builder.long_chunk(each, len(long), each.num_scheduled) for each in long)
        return min(-(-limit // 2), sum(may_have))

    def _place_long(
        self, builder: StepBuilder, long: list[RequestState], entering: RequestState | None
    ) -> None:
        """Share what short prompts left among long ones, and at least what was kept for them."""
        kept, builder.reserved = builder.reserved, 0
        builder.give_kept()
        if entering is not None:
            long = [entering, *long]
        for index, request in enumerate(long):
            num_sharing = len(long) - index
            share = max(-(-builder.chunk(request) // num_sharing), -(-kept // num_sharing))
            num = min(share, builder.most(request), builder.readable(request.num_scheduled))
            num = min(num, builder.long_chunk(request, len(long), request.num_scheduled))
            num = min(num, request.num_to_schedule)
            if request is entering:
                builder.enter(request, num)
            else:
                self._place_chunk(builder, request, num)
            kept = max(kept - num, 0)

    def _place_chunk(self, builder: StepBuilder, request: RequestState, num: int) -> None:
        """Place so many tokens of a prompt, or as many as there are blocks for."""
        if num == 0 or request.status is not Status.RUNNING:
            return
        if not self._room_for(request) and not self._make_room(request, builder):
            builder.is_stalled = True
            return
        builder.place_prompt(request, min(num, self._room_for(request)))

    def _make_room(self, request: RequestState, builder: StepBuilder) -> bool:
        return self._running.make_room(request, builder.plan.seq, builder.now)

    def _room_for(self, request: RequestState) -> int:
        """Tokens that the request's blocks and all free ones could still take."""
        num_blocks = len(request.blocks) + self._running.pool.num_free
        return num_blocks * self._block_size - request.num_scheduled


def _by_need(rows: list[RequestState]) -> tuple[list[RequestState], list[RequestState]]:
    """Return the rows that have one token to compute, and those that have more.

    Asked of each row for each step: `RequestState.num_to_schedule`, without its call.
    """
    decodes: list[RequestState] = []
    prompts: list[RequestState] = []
    for request in rows:
        num_known, most = request.num_tokens + request.num_pending, request.num_kv_tokens
        num = (num_known if num_known < most else most) - request.num_scheduled  # noqa: FURB136
        if num == 1:
            decodes.append(request)
        elif num > 1:
            prompts.append(request)
    return decodes, prompts
