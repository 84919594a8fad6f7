"""Splits what a model thinks, between ``<think>`` and ``</think>``, from what it says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from lorax_router.service.chat.deltas import ChatDelta, ContentDelta, ReasoningDelta
from lorax_router.service.chat.grammars import literal
from lorax_router.service.chat.tool_parser import partial_length


class ReasoningParser(ABC):
    """Splits the text of one sequence; made anew for each.

    Args:
        is_inside: whether the prompt ends within the reasoning: its template writes the tag.
    """

    # As of a ToolCallParser.
    markers: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *, is_inside: bool) -> None:
        self.is_inside = is_inside

    @abstractmethod
    def feed(self, text: str) -> list[ChatDelta]:
        """Take in more of the text; return what is certain by now."""

    @abstractmethod
    def finish(self) -> list[ChatDelta]:
        """Return the rest: no more text comes."""

    @classmethod
    @abstractmethod
    def is_left_open(cls, prompt: str) -> bool:
        """Whether the end of a prompt's text lies within the reasoning."""

    @classmethod
    def grammar(
        cls,
        special_tokens: Mapping[str, int],  # noqa: ARG003
        *,
        is_inside: bool,  # noqa: ARG003
    ) -> str | None:
        """Return a Lark grammar of a reasoning, or of what is left of one; None: it has none.

        Its first rule is ``reasoning``.
        """
        return None


class ThinkParser(ReasoningParser):
    """Reasoning in tags, at the beginning of the answer.

    Newlines next to the tags are part of their form, as the templates write them.
    """

    markers = frozenset({"<think>", "</think>"})
    _begin, _end = "<think>", "</think>"

    def __init__(self, *, is_inside: bool) -> None:
        super().__init__(is_inside=is_inside)
        self._text = ""
        self._state = self._inside if is_inside else self._before
        # Whether newlines are still those that follow a tag.
        self._is_at_tag = True
        # Whether the model may write the tag that the prompt has already.
        self._may_repeat = is_inside

    def feed(self, text: str) -> list[ChatDelta]:
        """Take in more of the text; return what is certain by now."""
        self._text += text
        deltas: list[ChatDelta] = []
        while self._state(deltas):
            pass
        return deltas

    def finish(self) -> list[ChatDelta]:
        """Return the rest: no more text comes."""
        rest, self._text = self._text, ""
        if self._state == self._inside:
            rest = rest.rstrip("\n")
            return [ReasoningDelta(rest)] if rest else []
        return [ContentDelta(rest)] if rest else []

    @classmethod
    def is_left_open(cls, prompt: str) -> bool:
        """Whether the last tag of a prompt opens, and nothing but space stands behind it."""
        return prompt.rstrip().endswith(cls._begin)

    @classmethod
    def grammar(cls, special_tokens: Mapping[str, int], *, is_inside: bool) -> str:
        """See ReasoningParser."""
        begin = "" if is_inside else literal(cls._begin, special_tokens)
        if cls._end in special_tokens:
            rules = [rf"thought: /(.|\n)*/ {literal(cls._end, special_tokens)}"]
        else:
            rules = [r"thought[lazy]: /(.|\n)*<\/think>/"]
        return "\n".join([rf"reasoning: {begin} thought /\n{{0,2}}/", *rules])

    def _before(self, deltas: list[ChatDelta]) -> bool:
        stripped = self._text.lstrip()
        if stripped.startswith(self._begin):
            self._text = stripped[len(self._begin) :]
            self._state = self._inside
            return True
        if self._begin.startswith(stripped):
            return False
        self._is_at_tag = False
        self._state = self._after
        return True

    def _inside(self, deltas: list[ChatDelta]) -> bool:
        if self._is_at_tag:
            self._text = self._text.lstrip("\n")
        if self._may_repeat:
            if self._begin.startswith(self._text) and self._text != self._begin:
                return False
            self._text = self._text.removeprefix(self._begin)
            self._may_repeat = False
            return True
        found = self._text.find(self._end)
        if found >= 0:
            self._give(deltas, self._text[:found].rstrip("\n"))
            self._text = self._text[found + len(self._end) :]
            self._is_at_tag = True
            self._state = self._after
            return True
        kept = self._text[: len(self._text) - partial_length(self._text, self._end)].rstrip("\n")
        self._give(deltas, kept)
        self._text = self._text[len(kept) :]
        return False

    def _give(self, deltas: list[ChatDelta], text: str) -> None:
        if text:
            deltas.append(ReasoningDelta(text))
            self._is_at_tag = False

    def _after(self, deltas: list[ChatDelta]) -> bool:
        if self._is_at_tag:
            self._text = self._text.lstrip("\n")
        if self._text:
            deltas.append(ContentDelta(self._text))
            self._text, self._is_at_tag = "", False
        return False
