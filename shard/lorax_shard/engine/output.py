"""The output of one row: text of each token, the end, the text as a whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from lorax_contract.step import FinishCode, StoppingParams
from lorax_shard.engine.detokenizer import TextStream, detokenizer_of
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
        tokenizer: its tables are built once and shared by all rows.
        prompt_ids: the prompt, which the text continues; only its end is read.
        eos_token_ids: tokens that end a text.
        past_output_ids: output that was emitted earlier; counted, not emitted again.
    """

    __slots__ = ("_detokenizer", "_stopping", "_stream", "_visible")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: StoppingParams,
        eos_token_ids: Collection[int],
        past_output_ids: Iterable[int] = (),
    ) -> None:
        self._detokenizer = detokenizer_of(tokenizer)
        self._stream = TextStream(self._detokenizer, prompt_ids)
        self._stopping = Stopping(params, eos_token_ids)
        self._visible: list[str] = []
        for token_id in past_output_ids:
            self.push(int(token_id))

    def push(self, token_id: int) -> Emitted:
        """Take the row's next token.

        Text of a character that is not complete yet comes with the token that
        completes it, or as a replacement character with the last token.
        """
        visible, special = self._stream.push(token_id)
        finish, num_kept = self._stopping.push(token_id, visible)
        if num_kept is not None:
            visible, special = visible[:num_kept], ""
        elif finish != FinishCode.RUNNING:
            # A special token has flushed the stream, so this never follows its text.
            visible += self._stream.flush()
        self._visible.append(visible)
        return Emitted(visible + special, self._detokenizer.is_special(token_id), finish)

    @property
    def generated_text(self) -> str:
        """The whole output without special tokens, up to the end of a stop string."""
        return "".join(self._visible)
