"""From texts to tokens by a tokenizer of the ``tokenizers`` library: one text or two, whole or cut.

Only the library's batch calls let other Python threads run while they work (measured: a single
``encode`` of 1.6 MB keeps the interpreter for more than a second), so batches are what is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TextToEncode:
    """A text, or two that are read together, and how they become tokens."""

    text: str = field(repr=False)
    second: str | None = field(default=None, repr=False)
    # Whether the tokens that the model expects around texts are added.
    add_special_tokens: bool = True
    # To so many tokens their ends are cut, those around them included; None: to none.
    cut_to: int | None = None
    # Whether is told where each token stands in the text; of one text.
    with_spans: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether nothing is asked but the ids of one text that is not cut."""
        return self.second is None and self.cut_to is None and not self.with_spans


class EncodedText(NamedTuple):
    """The tokens of texts."""

    ids: list[int]
    # Where the second text begins, for models that tell the two apart; 0: nothing tells them apart.
    second_start: int = 0
    # By token, from which character of the text to which; empty of those around the text.
    spans: list[Span] | None = None


def encode_plain(
    tokenizer: Tokenizer, texts: list[str], *, add_special_tokens: bool
) -> list[EncodedText]:
    """Return the tokens of texts of which nothing else is asked, in one call of the library's."""
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [EncodedText(each.ids) for each in found]


def encode(tokenizer: Tokenizer, asked: TextToEncode) -> EncodedText:
    """Return the tokens of texts; raises whatever the library does."""
    found = _whole(tokenizer, asked) if asked.cut_to is None else _cut(tokenizer, asked)
    start = 0
    if asked.second is not None and 1 in (kinds := found.type_ids):
        start = kinds.index(1)
    return EncodedText(found.ids, start, _spans(tokenizer, asked, found))


def _whole(tokenizer: Tokenizer, asked: TextToEncode) -> Encoding:
    given = asked.text if asked.second is None else (asked.text, asked.second)
    # The fast call leaves offsets out, which halves the time.
    return tokenizer.encode_batch_fast([given], add_special_tokens=asked.add_special_tokens)[0]


def _cut(tokenizer: Tokenizer, asked: TextToEncode) -> Encoding:
    """Cut what is too long before the tokens around it are added."""
    assert asked.cut_to is not None
    texts = [asked.text] if asked.second is None else [asked.text, asked.second]
    parts = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    adds = asked.add_special_tokens
    num_around = tokenizer.num_special_tokens_to_add(len(parts) == 2) if adds else 0
    room = max(asked.cut_to - num_around, 0)
    lengths = [len(part.ids) for part in parts]
    for part, length in zip(parts, shared_room(lengths, room), strict=True):
        part.truncate(length)
    second = parts[1] if len(parts) == 2 else None
    return tokenizer.post_process(parts[0], second, add_special_tokens=adds)


def shared_room(lengths: list[int], room: int) -> list[int]:
    """Return how long one text, or each of two, may be: of two the longer one is cut first."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    short = min(*lengths, room // 2)
    kept = (short, room - short)
    return [*kept] if lengths[0] <= lengths[1] else [*reversed(kept)]


def _spans(tokenizer: Tokenizer, asked: TextToEncode, found: Encoding) -> list[Span] | None:
    if not asked.with_spans:
        return None
    # Of the whole text: to cut an encoding and add tokens around it moves offsets twice.
    whole = tokenizer.encode_batch([asked.text], add_special_tokens=False)[0]
    inside = iter(whole.offsets)
    return [(0, 0) if around else next(inside) for around in found.special_tokens_mask]
