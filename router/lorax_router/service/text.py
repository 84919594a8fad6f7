"""Makes the text that a client gets of the tokens of one sequence.

Streamed or not, a text is made here, so that both are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lorax_contract.step import FinishCode, TokenColumns
from lorax_router.service.engine.port import TokenChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStyle:
    """How the texts of one request look; see TextAssembler."""

    stops: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True

    def assembler(self, markers: Collection[str] = ()) -> TextAssembler:
        """Return what makes the text of one sequence."""
        return TextAssembler(
            self.stops,
            include_stop=self.include_stop,
            skip_special_tokens=self.skip_special_tokens,
            markers=markers,
        )


class TextAssembler:
    """The text of one sequence, as it comes.

    Args:
        stop_sequences: where it may end; what could become one of them is held back until it
            is known.
        include_stop: whether the stop sequence, or the text of the token that ended the
            sequence, is part of the text.
        skip_special_tokens: whether special tokens have no text.
        markers: special tokens that have one nevertheless.
    """

    __slots__ = ("_held", "_include_stop", "_markers", "_skip_special", "_stops", "stopped_by")

    def __init__(
        self,
        stop_sequences: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        markers: Collection[str] = (),
    ) -> None:
        self._stops = tuple(stop_sequences)
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._markers = markers
        self._held = ""
        # The stop sequence or the id of the stop token that ended it; None: something else did.
        self.stopped_by: str | int | None = None

    def feed(self, chunk: TokenChunk) -> str:
        """Return what a chunk adds to the text; of the last chunk all that is left."""
        pieces = self._pieces(chunk.tokens)
        if chunk.finish is not FinishCode.RUNNING:
            return self._last(pieces, chunk)
        if pieces:
            self._held += "".join(pieces)
        if not self._stops:
            text, self._held = self._held, ""
            return text
        split = len(self._held) - self._num_open()
        text, self._held = self._held[:split], self._held[split:]
        return text

    def _pieces(self, tokens: TokenColumns) -> list[str]:
        if not self._skip_special:
            return tokens.texts
        return [
            "" if special and text not in self._markers else text
            for text, special in zip(tokens.texts, tokens.special, strict=True)
        ]

    def _last(self, pieces: list[str], chunk: TokenChunk) -> str:
        text = self._held + "".join(pieces)
        self._held = ""
        if chunk.finish is FinishCode.STOP_SEQUENCE:
            # The shard cuts the text where the stop sequence ends. Of several that end there the
            # longest began first.
            stop = max((s for s in self._stops if text.endswith(s)), key=len, default="")
            if stop:
                self.stopped_by = stop
                return text if self._include_stop else text.removesuffix(stop)
            self.stopped_by = chunk.tokens.ids[-1]
        ended_by_token = chunk.finish in (FinishCode.STOP_SEQUENCE, FinishCode.EOS_TOKEN)
        if ended_by_token and not self._include_stop and pieces:
            text = text.removesuffix(pieces[-1])
        return text

    def _num_open(self) -> int:
        """Length of the longest end of the text that a stop sequence may begin with."""
        text = self._held
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
