"""When a row ends: end-of-text tokens, stop tokens, stop strings, the length limit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from lorax_contract.step import FinishCode, StoppingParams


class StopStrings:
    """Finds the first stop string to be complete in a text that arrives in parts.

    Keeps only the end of the text that a stop string may begin in.
    """

    __slots__ = ("_num_tail", "_strings", "_tail")

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(string for string in strings if string)
        self._num_tail = max((len(string) for string in self._strings), default=1) - 1
        self._tail = ""

    def __bool__(self) -> bool:
        return bool(self._strings)

    def push(self, text: str) -> int | None:
        """Return how much of ``text`` belongs to the output if a stop string ends in it.

        A text in which one ends is not taken.
        """
        window = self._tail + text
        for string in self._strings:
            if string in window:
                ends = [end for string in self._strings if (end := self._find(string, window)) > 0]
                if ends:
                    return min(ends) - len(self._tail)
                break
        self._keep_end(window)
        return None

    def skip(self, text: str) -> None:
        """Take a part in which none may end; one that begins in it may end later."""
        self._keep_end(self._tail + text)

    def _keep_end(self, window: str) -> None:
        self._tail = window[-self._num_tail :] if self._num_tail else ""

    def _find(self, string: str, window: str) -> int:
        """Return where the string's first occurrence that is not all tail ends, or 0."""
        start = window.find(string, max(0, len(self._tail) - len(string) + 1))
        return start + len(string) if start >= 0 else 0


class Verdict(NamedTuple):
    """Whether the row ends with a token, and how much of the token's text stays."""

    finish: FinishCode
    # Characters of the text that stay; None: all.
    num_kept: int | None = None


# The verdict on nearly every token, made once.
_GOES_ON = Verdict(FinishCode.RUNNING)


class Stopping:
    """Decides after each token of one row whether it was the last.

    An end-of-text token counts as such also when it is the last one allowed
    (LoRAX reports the length there). A stop token ends the row like a stop string.
    Among the first ``min_new_tokens`` nothing ends it but the limit.
    """

    __slots__ = (
        "_eos_token_ids", "_num_left", "_num_left_endless", "_stop_token_ids", "ending_ids",
        "stop_strings",
    )  # fmt: skip

    def __init__(self, params: StoppingParams, eos_token_ids: Collection[int]) -> None:
        self._eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        # Tokens that may end the row by themselves, and what in its text may.
        self.ending_ids = self._eos_token_ids | self._stop_token_ids
        self.stop_strings = StopStrings(params.stop_sequences)
        self._num_left = params.max_new_tokens
        self._num_left_endless = params.min_new_tokens

    @property
    def num_free(self) -> int:
        """How many tokens may come next that nothing but themselves or their text ends."""
        return 0 if self._num_left_endless > 0 else max(self._num_left - 1, 0)

    def pass_free(self, count: int) -> None:
        """Count so many of the free tokens, which ended nothing; ``stop_strings`` took their text."""
        self._num_left -= count

    def push(self, token_id: int, text: str) -> Verdict:
        """Count one token; ``text`` is what it added, without special tokens."""
        self._num_left -= 1
        if self._num_left_endless > 0:
            self._num_left_endless -= 1
            self.stop_strings.skip(text)
            return self._go_on()
        if token_id in self._eos_token_ids:
            return Verdict(FinishCode.EOS_TOKEN)
        num_kept = self.stop_strings.push(text)
        if num_kept is not None:
            return Verdict(FinishCode.STOP_SEQUENCE, num_kept)
        if token_id in self._stop_token_ids:
            return Verdict(FinishCode.STOP_SEQUENCE)
        return self._go_on()

    def _go_on(self) -> Verdict:
        return _GOES_ON if self._num_left > 0 else Verdict(FinishCode.LENGTH)
