"""The output of one row: text of each token, the end, the text as a whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from lorax_contract.step import FinishCode, StoppingParams
from lorax_shard.engine.detokenizer import TextStream, TokenReader
from lorax_shard.engine.stopping import Stopping


class Emitted(NamedTuple):
    """What a pushed token shows: its text, whether it is special, whether the row ends."""

    text: str
    special: bool
    finish: FinishCode


class RowOutput:
    """Turns the tokens of one row into text and decides when it ends.

    All state follows from the constructor's arguments: built again with the tokens
    pushed so far as ``past_output_ids``, it goes on as if nothing had happened.

    Args:
        reader: shared by all rows.
        prompt_ids: the prompt, which the text continues; only its end is read.
        eos_token_ids: tokens that end a text.
        past_output_ids: output that was emitted earlier; counted, not emitted again.
    """

    __slots__ = (
        "_ending_ids", "_num_free", "_num_passed", "_plain_texts", "_reader", "_stop_strings",
        "_stopping", "_stream", "_visible",
    )  # fmt: skip

    def __init__(
        self,
        reader: TokenReader,
        prompt_ids: Sequence[int],
        params: StoppingParams,
        eos_token_ids: Collection[int],
        past_output_ids: Iterable[int] = (),
    ) -> None:
        self._reader = reader
        self._stream = TextStream(reader, prompt_ids)
        self._stopping = Stopping(params, eos_token_ids)
        self._visible: list[str] = []
        # What push_plain looks at: how many tokens it may take up to the next push, how many it
        # took, and what it may not.
        self._plain_texts = reader.plain_texts
        self._ending_ids = self._stopping.ending_ids
        self._stop_strings = self._stopping.stop_strings or None
        self._num_passed = 0
        self._num_free = self._count_free()
        for token_id in past_output_ids:
            self.push(int(token_id))

    def push_plain(self, token_id: int) -> str | None:
        """Take the row's next token if it is plain text that ends nothing, as most are.

        Returns its text. None: it is to be pushed, and nothing was taken.
        """
        text = self._plain_texts.get(token_id)
        if text is None or self._num_passed >= self._num_free or token_id in self._ending_ids:
            return None
        if self._stop_strings is not None and self._stop_strings.push(text) is not None:
            return None
        self._num_passed += 1
        self._visible.append(text)
        return text

    def _count_free(self) -> int:
        # Text behind an incomplete character shows that something is missing there.
        return 0 if self._stream.is_amid_character else self._stopping.num_free

    def push(self, token_id: int) -> Emitted:
        """Take the row's next token.

        Text of a character that is not complete yet comes with the token that completes it.
        What the end or a special token cuts off is no part of the generated text, to which the
        texts of all tokens but the special ones add up.
        """
        if (text := self.push_plain(token_id)) is not None:
            return Emitted(text, special=False, finish=FinishCode.RUNNING)
        self._stopping.pass_free(self._num_passed)
        emitted = self._push_any(token_id)
        self._num_passed, self._num_free = 0, self._count_free()
        return emitted

    def _push_any(self, token_id: int) -> Emitted:
        before, special_text = self._stream.push(token_id)
        is_special = self._reader.is_special(token_id)
        visible = "" if is_special else before
        finish, num_kept = self._stopping.push(token_id, visible)
        visible = visible[:num_kept]
        self._visible.append(visible)
        if not is_special:
            return Emitted(visible, is_special, finish)
        # Before a special token comes nothing but a character that was not completed. It shows
        # that something is missing there; at the end nothing is.
        text = special_text if finish != FinishCode.RUNNING else before + special_text
        return Emitted(text, is_special, finish)

    @property
    def generated_text(self) -> str:
        """The whole output without special tokens, up to the end of a stop string."""
        return "".join(self._visible)
