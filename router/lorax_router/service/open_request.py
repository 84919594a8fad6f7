"""A request that was received and has not ended: what it holds until then."""

from __future__ import annotations

from lorax_contract.errors import LoraxError
from lorax_contract.step import BASE_ADAPTER, AdapterHandle, OutputKind
from lorax_router.service.adapters.directory import AdapterLease
from lorax_router.service.adapters.text import AdapterText
from lorax_router.service.permits import Permit
from lorax_router.service.records import RequestRecord
from lorax_router.service.requests import ValidRequest
from lorax_router.service.results import GenerateResult, Sequence, shown_numbers
from lorax_router.service.sequences import SequenceChunks
from lorax_router.service.validation import CheckedRequest


class OpenRequest:
    """One request from its receipt to its end, which comes once, whatever it has by then.

    Args:
        record: its account.
    """

    __slots__ = (
        "checked", "chunks", "error", "is_open", "lease", "permit", "record", "result", "valid",
    )  # fmt: skip

    checked: CheckedRequest
    valid: ValidRequest

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.permit: Permit | None = None
        # None: it has no adapter, or waits for it.
        self.lease: AdapterLease | None = None
        # Of what is computed for it.
        self.chunks: SequenceChunks | None = None
        self.is_open = True
        # What came of it, where it is answered as a whole.
        self.result: GenerateResult | None = None
        self.error: LoraxError | None = None

    @property
    def waits(self) -> bool:
        """Whether its adapter has to be found first."""
        return self.checked.selection is not None and self.lease is None

    @property
    def handle(self) -> AdapterHandle:
        """What its rows are computed with."""
        return BASE_ADAPTER if self.lease is None else self.lease.handle

    @property
    def text(self) -> AdapterText:
        """What its adapter brings for texts."""
        return AdapterText() if self.lease is None else self.lease.text

    @property
    def adapter_content(self) -> str:
        """What its adapter is, whatever server has it; "": there is none."""
        return "" if self.lease is None else self.lease.content.key

    @property
    def outcome(self) -> GenerateResult | LoraxError:
        """The whole answer, or what there is in its place."""
        found = self.result or self.error
        assert found is not None
        return found

    def answer(self, sequences: list[Sequence]) -> None:
        """End it with all its sequences as its answer; raises ValidationError."""
        valid, record = self.valid, self.record
        if valid.output is OutputKind.VECTOR:
            for sequence in sequences:
                assert sequence.vector is not None
                sequence.vector = valid.shape.finished(sequence.vector)
        shown = shown_numbers(sequences, valid.num_returned)
        record.show(shown)
        self.result = GenerateResult(
            sequences=tuple(sequences[number] for number in shown),
            texts=tuple(valid.full_text(sequences[number].generated_text) for number in shown),
            details=valid.details,
            num_prompt_chars=len(valid.sent_text),
            new_parser=valid.new_parser,
            num_prompt_tokens=valid.num_prompt_tokens,
            num_cached_tokens=record.num_cached,
            num_skipped_tokens=record.num_skipped,
            timings=record.timings,
            adapter=record.adapter,
            head=valid.head,
            spans=None if valid.spans is None else [*valid.spans],
        )
        self.end(None)

    def fail(self, error: LoraxError) -> None:
        """End it with what is wrong, unless it has ended."""
        if self.is_open:
            self.error = error
            self.end(error)

    async def close(self, error: BaseException) -> None:
        """End it, and what is computed for it, because of what is wrong with others."""
        if self.is_open and self.chunks is not None:
            await self.chunks.aclose()
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Give back what it holds, and write its account; more than once does nothing."""
        if not self.is_open:
            return
        self.is_open = False
        if self.lease is not None:
            self.lease.release()
        if self.permit is not None:
            self.permit.give_back()
        self.record.close(error)
