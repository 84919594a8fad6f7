"""What form of a message's content a chat template reads: one text, or a list of parts.

Clients may send either. A template that only writes ``message.content`` would write a list
the way Python prints it; one that walks over the parts needs the list. Which it is shows in
the template's syntax: whether anything that it walks over is the content of a message.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Literal

from jinja2 import nodes

from lorax_router.service.prompts.sandbox import parse_template

ContentFormat = Literal["string", "openai"]

# Filters that walk over what they are given.
_WALKING = frozenset({"map", "select", "selectattr", "reject", "rejectattr", "groupby"})
# Filters that give one of what they are given.
_PICKING = frozenset({"first", "last"})
# Rounds that an assignment may take to reach its last use; templates nest far less.
_MAX_ROUNDS = 16

_Kinds = frozenset[str]
_NOTHING: _Kinds = frozenset()
_CHAT: _Kinds = frozenset({"messages"})
_MESSAGE: _Kinds = frozenset({"message"})
_CONTENT: _Kinds = frozenset({"content"})


@functools.lru_cache(maxsize=16)
def content_format_of(text: str) -> ContentFormat:
    """Return ``openai`` for a template that walks over parts of a content, else ``string``."""
    try:
        return "openai" if _Names(parse_template(text)).walks_over_content() else "string"
    except RecursionError:
        return "string"


class _Names:
    """Which names of a template may hold the chat, a message or a message's content."""

    def __init__(self, template: nodes.Template) -> None:
        self._template = template
        self._macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
        self._kinds: dict[str, _Kinds] = {"messages": _CHAT}
        for _ in range(_MAX_ROUNDS):
            before = dict(self._kinds)
            for name, kinds in self._bindings():
                self._kinds[name] = self._kinds.get(name, _NOTHING) | kinds
            if before == self._kinds:
                break

    def walks_over_content(self) -> bool:
        """Whether a loop or a filter walks over what may be a content."""
        walked: list[nodes.Node] = [loop.iter for loop in self._template.find_all(nodes.For)]
        filters = self._template.find_all(nodes.Filter)
        walked += [each.node for each in filters if each.name in _WALKING and each.node]
        return any("content" in self._of(each) for each in walked)

    def _bindings(self) -> Iterator[tuple[str, _Kinds]]:
        for assign in self._template.find_all(nodes.Assign):
            yield from self._bound(assign.target, self._of(assign.node))
        for loop in self._template.find_all(nodes.For):
            yield from self._bound(loop.target, _items(self._of(loop.iter)))
        for call in self._template.find_all(nodes.Call):
            yield from self._arguments(call)

    def _bound(self, target: nodes.Node, kinds: _Kinds) -> Iterator[tuple[str, _Kinds]]:
        name = _name_of(target)
        if name is not None and kinds:
            yield name, kinds

    def _arguments(self, call: nodes.Call) -> Iterator[tuple[str, _Kinds]]:
        """Yield what a call of a macro hands to its parameters."""
        macro = self._macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is None:
            return
        by_position: Iterable[tuple[nodes.Name, nodes.Expr]] = zip(macro.args, call.args)
        for parameter, value in by_position:
            yield parameter.name, self._of(value)
        for keyword in call.kwargs:
            yield keyword.key, self._of(keyword.value)

    def _of(self, node: nodes.Node | None) -> _Kinds:
        """Return what the value of an expression may be."""
        match node:
            case nodes.Name() | nodes.NSRef():
                return self._kinds.get(_name_of(node) or "", _NOTHING)
            case nodes.Filter():
                kinds = self._of(node.node)
                return _items(kinds) if node.name in _PICKING else kinds
            case nodes.CondExpr():
                return self._of(node.expr1) | self._of(node.expr2)
            case nodes.And() | nodes.Or():
                return self._of(node.left) | self._of(node.right)
            case nodes.Getattr():
                named = self._kinds.get(_name_of(node) or "", _NOTHING)
                return named | _member(self._of(node.node), node.attr)
            case nodes.Getitem(arg=nodes.Slice()):
                return self._of(node.node)
            case nodes.Getitem():
                key = node.arg.value if isinstance(node.arg, nodes.Const) else None
                return _member(self._of(node.node), key)
            case nodes.Call(
                node=nodes.Getattr(node=owner, attr="get"), args=[nodes.Const(value=key), *_]
            ):
                return _member(self._of(owner), key)
        return _NOTHING


def _name_of(node: nodes.Node) -> str | None:
    """Return the name by which a value is kept, ``a`` or ``a.b``."""
    match node:
        case nodes.Name():
            return str(node.name)
        case nodes.NSRef():
            return f"{node.name}.{node.attr}"
        case nodes.Getattr(node=nodes.Name(name=name)):
            return f"{name}.{node.attr}"
    return None


def _items(kinds: _Kinds) -> _Kinds:
    """Return what one of the items is."""
    return _MESSAGE if "messages" in kinds else _NOTHING


def _member(kinds: _Kinds, key: object) -> _Kinds:
    found = _NOTHING
    if "messages" in kinds and not isinstance(key, str):
        found |= _MESSAGE
    if "message" in kinds and key == "content":
        found |= _CONTENT
    return found
