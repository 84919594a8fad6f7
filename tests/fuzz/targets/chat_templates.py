"""Chat templates of adapters: their files are read here, their texts in a limited process."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import re
from typing import Any

from tests.fuzz.targets.lost_processes import ProcessesLost
from tests.fuzz.targets.mutate import DOCUMENT_MUTATORS, ODD, TEXT_MUTATORS, dumped
from tests.fuzz.targets.target import Case, LoopTarget, Mutator, require, require_words
from tests.fuzz.targets.template_language import expression, statement
from tests.helpers import chat_formats

from lorax_contract.adapters import AdapterPart, AdapterUnavailableError, FetchedAdapter
from lorax_contract.errors import TemplateError
from lorax_router.service.adapters.text import AdapterTexts
from lorax_router.service.prompts.chat_renderers import ChatRenderers
from lorax_router.service.prompts.renderer_pool import RenderLimits
from lorax_router.service.requests import ChatPrompt

_LIMITS = RenderLimits(deadline_s=2.0, memory_bytes=128 << 20, max_chars=1 << 18)
_TEMPLATES = tuple(chat_formats.FORMATS.values())
_TOKEN = re.compile(r"\{%-?|-?%\}|\{\{-?|-?\}\}|\w+|'[^']*'|\s+|.", re.DOTALL)
_CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the time?"},
        {"role": "assistant", "content": "Noon."},
        {"role": "user", "content": "Really?"},
    ],
    "tools": None,
}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
]


class ChatTemplates(LoopTarget):
    """A content has the text of a template, its files, and the chat that is rendered."""

    name = "templates"
    num_per_opening = 2000
    most_cpu_s = 5.0

    def __init__(self) -> None:
        chat = {f"chat_{name}": _of("chat", each) for name, each in DOCUMENT_MUTATORS.items()}
        self.mutators = chat | {
            each.__name__.removeprefix("_"): each
            for each in (
                _made,
                _token,
                _splice,
                _more,
                _deep,
                _tools,
                _parts,
                _config,
                _many,
                _flag,
            )
        }
        self.raw_mutators = {name: _of_files(each) for name, each in TEXT_MUTATORS.items()}
        self._lost = ProcessesLost()

    def plain(self, draw: random.Random) -> Any:
        """Return a template of a public format, in a file of its own."""
        return {
            "text": draw.choice(_TEMPLATES),
            "config": None,
            "chat": copy.deepcopy(_CHAT),
            "flags": {},
        }

    def written(self, content: Any) -> Any:
        """Return the files as bytes."""
        files = {"chat_template.jinja": content["text"].encode("utf-8", "surrogatepass")}
        if content["config"] is not None:
            files = {"tokenizer_config.json": dumped(content["config"]) or b"{}"}
        return {"files": files, "chat": content["chat"], "flags": content["flags"]}

    async def opened(self, stack: contextlib.AsyncExitStack) -> None:
        """Start what renders."""
        self._renderers = ChatRenderers(None, _LIMITS)
        stack.push_async_callback(self._renderers.close)
        log = logging.getLogger("lorax_router.service.prompts.renderer_pool")
        log.addHandler(self._lost)
        stack.callback(log.removeHandler, self._lost)

    async def judged(self, case: Case) -> str:
        """It is refused in words, or a text is there; no process ends by an error of ours."""
        files = case.content["files"]

        async def read(_digest: str, names: Any) -> dict[str, bytes]:
            return {name: files[name] for name in names if name in files}

        self._lost.words.clear()
        texts = AdapterTexts(read, special_tokens=chat_formats.SPECIAL_TOKENS)
        fetched = FetchedAdapter(
            version="1", part=AdapterPart("content", "files"), disk_bytes=1, device_bytes=1,
            max_rank=1, text_files=tuple(files),
        )  # fmt: skip
        try:
            own = (await texts.find("a", fetched)).chat_template
            if own is None:
                return "no template"
            text = await self._renderers.render(_prompt(case.content), own)
        except (AdapterUnavailableError, TemplateError) as error:
            require_words(str(error))
            require_words(error.public if isinstance(error, TemplateError) else error.text)
            return "refused"
        finally:
            await texts.close()
            require(not self._lost.words, f"a process ended by an error: {self._lost.words}")
        require(len(text) <= _LIMITS.max_chars, f"a text of {len(text)} characters")
        return "taken"


def _prompt(content: Any) -> ChatPrompt:
    chat = content["chat"] if isinstance(content["chat"], dict) else {}
    messages = chat.get("messages")
    messages = (
        [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    )
    kwargs = {key: value for key, value in chat.items() if key not in _CHAT}
    tools = chat.get("tools")
    return ChatPrompt(
        messages=messages,
        tools=[each for each in tools if isinstance(each, dict)]
        if isinstance(tools, list)
        else None,
        template_kwargs=kwargs,
        **content["flags"],
    )


def _of(part: str, mutator: Mutator) -> Mutator:
    def change(draw: random.Random, content: Any) -> Any:
        return {**content, part: mutator(draw, content[part])}

    return change


def _of_files(mutator: Mutator) -> Mutator:
    def change(draw: random.Random, content: Any) -> Any:
        files = {name: mutator(draw, raw) for name, raw in content["files"].items()}
        return {**content, "files": files}

    return change


def _made(draw: random.Random, content: Any) -> Any:
    """A template that the language's grammar makes."""
    return {**content, "text": "".join(statement(draw) for _ in range(draw.randint(1, 5)))}


def _token(draw: random.Random, content: Any) -> Any:
    """One word of it is left out, doubled, or another one."""
    tokens = _TOKEN.findall(content["text"])
    for _ in range(draw.choice([1, 1, 2, 5])):
        if not tokens:
            break
        place = draw.randrange(len(tokens))
        piece = [[], [tokens[place]] * 2, [draw.choice(tokens)], [expression(draw)]]
        tokens[place : place + 1] = draw.choice(piece)
    return {**content, "text": "".join(tokens)}


def _splice(draw: random.Random, content: Any) -> Any:
    """The beginning of it and the end of another one."""
    other = draw.choice(_TEMPLATES)
    text = content["text"][: draw.randint(0, len(content["text"]))]
    return {**content, "text": text + other[draw.randint(0, len(other)) :]}


def _more(draw: random.Random, content: Any) -> Any:
    """A piece somewhere in it."""
    place = draw.randint(0, len(content["text"]))
    return {**content, "text": content["text"][:place] + statement(draw) + content["text"][place:]}


def _deep(draw: random.Random, content: Any) -> Any:
    """Something within itself, often, or without an end."""
    times = draw.choice([20, 200, 3_000])
    text = draw.choice([
        "{{ " + "(" * times + "1" + ")" * times + " }}", "{% if 1 %}" * times + "{% endif %}" * times,
        "{{ " + "[" * times + "]" * times + " }}", "{{ " + "-" * times + "1 }}", "{{ x" + ".x" * times + " }}",
        "{{ " + "not " * times + "1 }}", "{{ 9**(9**9) }}", "{{ 'a' * 10**10 }}", "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | tojson * 100000 }}", "{{ 'x' | center(10**9) }}",
        "{{ 1" + " + 1" * times + " }}", "{% set a %}" * times + "{% endset %}" * times, "{{ '%999999999d' % 1 }}",
    ])  # fmt: skip
    return {**content, "text": text}


def _tools(draw: random.Random, content: Any) -> Any:
    """Tools, and calls of them."""
    chat = content["chat"] if isinstance(content["chat"], dict) else {}
    return {**content, "chat": {**chat, "tools": copy.deepcopy(_TOOLS)}}


def _parts(draw: random.Random, content: Any) -> Any:
    """Contents of other forms, and fields that few messages have."""
    fields: list[dict[str, Any]] = [
        {"content": [{"type": "text", "text": "x"}, {"type": "text"}]}, {"content": None}, {"content": [{"type": "image"}]},
        {"reasoning_content": "so"}, {"name": "x"}, {"role": "tool", "tool_call_id": "1", "content": "5"},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "no JSON"}}]},
    ]  # fmt: skip
    messages = [*copy.deepcopy(_CHAT["messages"] or [])]
    message = draw.choice(messages)
    message.update(draw.choice(fields))
    return {**content, "chat": {"messages": messages, "tools": None}}


def _config(draw: random.Random, content: Any) -> Any:
    """The template in a tokenizer's configuration, by name perhaps."""
    text = content["text"]
    named = [text, [{"name": "default", "template": text}], {"default": text}, [{"name": "rag", "template": text}], draw.choice(ODD),
             [{"name": "default", "template": text}, {"name": "tool_use", "template": draw.choice([text, 5])}]]  # fmt: skip
    document = {
        "chat_template": draw.choice(named),
        "bos_token": draw.choice(["<s>", {"content": "<s>"}, *ODD]),
        "eos_token": "</s>",
    }
    return {**content, "config": draw.choice([document, document, draw.choice(ODD)])}


def _many(draw: random.Random, content: Any) -> Any:
    """Very many messages, or long ones."""
    messages = [{"role": "user", "content": "x" * draw.choice([1, 2_000])}] * draw.choice([50, 500])
    return {**content, "chat": {"messages": messages, "tools": None}}


def _flag(draw: random.Random, content: Any) -> Any:
    """The last message goes on, or no other one begins."""
    flags = draw.choice(
        [
            {"continue_final_message": True, "add_generation_prompt": False},
            {"add_generation_prompt": False},
        ]
    )
    return {**content, "flags": flags}
