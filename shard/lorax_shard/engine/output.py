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

    __slots__ = ("_reader", "_stopping", "_stream", "_visible")

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
        for token_id in past_output_ids:
            self.push(int(token_id))

    def push(self, token_id: int) -> Emitted:
        """Take the row's next token.

        Text of a character that is not complete yet comes with the token that completes it.
        What the end cuts off is left out: it is no character.
        """
        visible, special = self._stream.push(token_id)
        finish, num_kept = self._stopping.push(token_id, visible)
        if num_kept is not None:
            visible, special = visible[:num_kept], ""
        elif finish != FinishCode.RUNNING and special:
            # All that comes before a special token is what was not completed.
            visible = ""
        self._visible.append(visible)
        return Emitted(visible + special, self._reader.is_special(token_id), finish)

    @property
    def generated_text(self) -> str:
        """The whole output without special tokens, up to the end of a stop string."""
        return "".join(self._visible)
