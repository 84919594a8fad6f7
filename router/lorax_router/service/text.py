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
        # Texts that are not given out, and whether each is a special token's: no stop sequence
        # lies in these, and one may go on behind them.
        self._held: list[tuple[str, bool]] = []
        # The stop sequence or the id of the stop token that ended it; None: something else did.
        self.stopped_by: str | int | None = None

    def feed(self, chunk: TokenChunk) -> str:
        """Return what a chunk adds to the text; of the last chunk all that is left."""
        texts = self._texts(chunk.tokens)
        if self._stops:
            self._held += zip(texts, chunk.tokens.special)
            texts = []
        if chunk.finish is not FinishCode.RUNNING:
            return self._last(texts, chunk)
        return self._released(self._num_open()) if self._stops else "".join(texts)

    def _texts(self, tokens: TokenColumns) -> list[str]:
        if not self._skip_special:
            return tokens.texts
        return [
            "" if special and text not in self._markers else text
            for text, special in zip(tokens.texts, tokens.special, strict=True)
        ]

    def _last(self, texts: list[str], chunk: TokenChunk) -> str:
        if chunk.finish is FinishCode.STOP_SEQUENCE:
            if stop := self._stop(chunk.tokens):
                self.stopped_by = stop
                return self._released(0 if self._include_stop else len(stop))
            self.stopped_by = chunk.tokens.ids[-1]
        texts = [*(text for text, _ in self._held), *texts]
        ended_by_token = chunk.finish in (FinishCode.STOP_SEQUENCE, FinishCode.EOS_TOKEN)
        if ended_by_token and not self._include_stop and chunk.tokens.ids:
            texts.pop()
        return "".join(texts)

    def _stop(self, tokens: TokenColumns) -> str:
        """Return the stop sequence that ended the text; empty: a stop token did."""
        if tokens.special[-1] or not tokens.texts[-1]:
            return ""
        # The shard cuts the text where the stop sequence ends. Of several that end there the
        # longest began first.
        text = self._visible()
        return max((s for s in self._stops if text.endswith(s)), key=len, default="")

    def _visible(self) -> str:
        """The held text as stop sequences are looked for in it."""
        return "".join(text for text, special in self._held if not special)

    def _released(self, num_kept: int) -> str:
        """Give out all but so many visible characters at the end, and what stands among them."""
        kept: list[tuple[str, bool]] = []
        while num_kept:
            text, special = self._held.pop()
            if special or len(text) <= num_kept:
                kept.append((text, special))
                num_kept -= 0 if special else len(text)
            else:
                self._held.append((text[:-num_kept], False))
                kept.append((text[-num_kept:], False))
                num_kept = 0
        given = "".join(text for text, _ in self._held)
        self._held = kept[::-1]
        return given

    def _num_open(self) -> int:
        """Length of the longest end of the text that a stop sequence may begin with."""
        text = self._visible()
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
