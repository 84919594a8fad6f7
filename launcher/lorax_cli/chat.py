"""A conversation at a terminal, in which the adapter may change from one reply to the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from lorax_cli.client import CliError, Server

HELP = (
    "/adapter NAME  go on with another adapter (without a name: with the base)\n"
    "/adapters      what may be named\n"
    "/system TEXT   what the model is told before all else (without a text: nothing)\n"
    "/again         answer the last message anew, by the adapter of now\n"
    "/reset         forget what was said\n"
    "/quit          leave; so does Ctrl-D. Ctrl-C stops an answer"
)


@dataclass(slots=True)
class Reply:
    """What an answer took."""

    text: str = ""
    first_s: float | None = None
    seconds: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    # Whether all of it came.
    is_whole: bool = False

    def __str__(self) -> str:
        parts = [f"first token {self.first_s:.2f} s" if self.first_s is not None else "no token"]
        num = self.usage.get("completion_tokens", 0)
        if self.first_s is not None and num > 1 and self.seconds > self.first_s:
            parts.append(f"{(num - 1) / (self.seconds - self.first_s):.1f} tokens/s")
        if "prompt_tokens" in self.usage:
            cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            parts.append(f"{self.usage['prompt_tokens']} + {num} tokens, {cached} of them cached")
        return ", ".join(parts)


def answer(server: Server, path: str, body: dict[str, Any], write: Callable[[str], None]) -> Reply:
    """Stream an answer piece by piece to ``write``; Ctrl-C ends it, and keeps what has come."""
    reply, begun = Reply(), time.perf_counter()
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    events = server.stream(path, asked)
    try:
        for event in events:
            for choice in event.get("choices", ()):
                if piece := _text_of(choice):
                    reply.first_s = reply.first_s or time.perf_counter() - begun
                    reply.text += piece
                    write(piece)
            reply.usage = event.get("usage") or reply.usage
        reply.is_whole = True
    except KeyboardInterrupt:
        events.close()  # type: ignore[attr-defined]
    reply.seconds = time.perf_counter() - begun
    return reply


def _text_of(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return str(choice.get("text") or delta.get("content") or delta.get("reasoning_content") or "")


class Chat:
    """Reads lines and answers them until the input ends.

    Args:
        server: answers.
        console: where things about the conversation are said; answers are written as they come.
        read: returns the next line, or raises EOFError.
        settings: what every request says beside its messages.
        adapter: the one to begin with; None: the base.
    """

    def __init__(
        self,
        server: Server,
        console: Console,
        read: Callable[[str], str],
        settings: dict[str, Any],
        *,
        adapter: str | None = None,
        system: str = "",
    ) -> None:
        self._server, self._console, self._read = server, console, read
        self._settings, self._adapter, self._system = settings, adapter, system
        self._base = str(server.models()[0]["id"])
        self._said: list[dict[str, str]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._switch, "/adapters": self._list, "/system": self._tell,
            "/again": self._again, "/reset": self._reset, "/help": self._help,
        }  # fmt: skip

    def run(self) -> None:
        """Converse."""
        self._say(f"{self._server.url}, {self._base}. /help lists what may be said beside.")
        while True:
            try:
                line = self._read(f"{self._adapter or 'base'}> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._console.print()
                continue
            if line == "/quit":
                return
            if line:
                self._take(line)

    def _take(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        try:
            if word in self._commands:
                self._commands[word](rest.strip())
            elif word.startswith("/"):
                raise CliError(f"{word} is none of the words that may be said: /help lists them")
            else:
                self._ask(line)
        except CliError as error:
            self._console.print(str(error), style="red", highlight=False, markup=False)

    def _ask(self, text: str) -> None:
        self._said.append({"role": "user", "content": text})
        try:
            reply = self._answered()
        except CliError:
            # It can be asked again, and is not asked twice.
            self._said.pop()
            raise
        self._said.append({"role": "assistant", "content": reply.text})

    def _answered(self) -> Reply:
        told = [{"role": "system", "content": self._system}] if self._system else []
        body = self._settings | {
            "model": self._adapter or self._base, "messages": [*told, *self._said],
        }  # fmt: skip
        reply = answer(self._server, "/v1/chat/completions", body, self._write)
        self._console.print()
        self._say(str(reply) + ("" if reply.is_whole else "; stopped"))
        return reply

    def _write(self, piece: str) -> None:
        self._console.out(piece, end="", highlight=False)
        self._console.file.flush()

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False, markup=False)

    # --- what may be said beside ------------------------------------------------------

    def _switch(self, name: str) -> None:
        self._adapter = name or None
        self._say(f"the next answer is {name or self._base}'s")

    def _list(self, _rest: str) -> None:
        for model in self._server.models():
            self._say(str(model["id"]))

    def _tell(self, text: str) -> None:
        self._system = text
        self._say("the model is told so from the next answer on" if text else "it is told nothing")

    def _again(self, _rest: str) -> None:
        if not self._said:
            raise CliError("nothing was said yet")
        answered = self._said.pop()
        try:
            reply = self._answered()
        except CliError:
            self._said.append(answered)
            raise
        self._said.append({"role": "assistant", "content": reply.text})

    def _reset(self, _rest: str) -> None:
        self._said.clear()
        self._say("all that was said is forgotten")

    def _help(self, _rest: str) -> None:
        self._say(HELP)
