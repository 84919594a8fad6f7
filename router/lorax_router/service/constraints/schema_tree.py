"""The schemas within a JSON schema, and what those refer to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

Schema = Any

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLES = (
    "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip


class References:
    """What the references of one document mean within it: pointers, anchors, names of its parts."""

    def __init__(self, document: Schema) -> None:
        # By id(): against what a schema's reference is read.
        self._bases: dict[int, str] = {}
        self._named: dict[str, Schema] = {"": document}
        self._targets: dict[int, Schema] = {}
        self._read(document)
        self._base = self._bases.get(id(document), "")

    def target(self, node: Mapping[str, Any]) -> Schema:
        """Return what a schema refers to; None: nothing, or that is another document's affair."""
        reference = node.get("$ref")
        if not isinstance(reference, str):
            return None
        if id(node) not in self._targets:
            self._targets[id(node)] = self._found(node, reference)
        return self._targets[id(node)]

    def _found(self, node: Mapping[str, Any], reference: str) -> Schema:
        base = self._bases.get(id(node), self._base)
        # Not all bases are such that something can be joined to them.
        name, fragment = urldefrag(
            base + reference if reference.startswith("#") else urljoin(base, reference)
        )
        if fragment and not fragment.startswith("/"):
            return self._named.get(f"{name}#{unquote(fragment)}")
        return _pointed(self._named.get(name), unquote(fragment))

    def _read(self, document: Schema) -> None:
        waiting: list[tuple[Schema, str]] = [(document, "")]
        while waiting:
            node, base = waiting.pop()
            if not isinstance(node, dict) or id(node) in self._bases:
                continue
            if isinstance(name := node.get("$id"), str):
                base, _ = urldefrag(urljoin(base, name))
                self._named[base] = node
            self._bases[id(node)] = base
            if isinstance(anchor := node.get("$anchor"), str):
                self._named[f"{base}#{anchor}"] = node
            waiting.extend((inner, base) for inner in children(node))


def walk(
    schemas: Iterable[Schema], references: References | None = None
) -> Iterator[dict[str, Any]]:
    """Yield schemas and all schemas within them, each once; with ``references`` their targets too."""
    waiting: list[Schema] = list(schemas)
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        waiting.extend(children(node))
        if references is not None:
            waiting.append(references.target(node))


def children(node: Mapping[str, Any]) -> Iterator[Schema]:
    """Yield the schemas in a schema, without those in them."""
    for name in _MAPS:
        if isinstance(inner := node.get(name), dict):
            yield from inner.values()
    for name in _LISTS:
        yield from listed(node, name)
    for name in _SINGLES:
        # As drafts before 2020 have it, items may be a list.
        inner = node.get(name)
        yield from inner if isinstance(inner, list) else [inner]


def listed(node: Mapping[str, Any], name: str) -> list[Any]:
    """Return what a keyword lists; nothing where it is no list."""
    return value if isinstance(value := node.get(name), list) else []


def _pointed(node: Schema, pointer: str) -> Schema:
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node
