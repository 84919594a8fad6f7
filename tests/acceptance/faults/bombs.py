"""What attackers send: adapters that are no adapters, names that lead elsewhere, grammars without end."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.helpers.formula_adapters import write_formula_adapter

# Names of each bomb: what is known of one helps against none of the others.
NUM_NAMES = 24
Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Assault:
    """One kind of attack, and how it is refused."""

    title: str
    path: str
    # The n-th request of its kind.
    body: Callable[[int], Body]
    # What the answer says.
    words: str
    statuses: tuple[int, ...] = (422,)


def _with_header(header: bytes, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _shape(shape: list[int], begin: int, end: int) -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    return json.dumps({"base_model.model.x.lora_A.weight": entry}).encode()


# By the adapter's name: the bytes in place of its weights.
_WEIGHTS = {
    "length": _with_header(b"{}", (1 << 64) - 1),
    "header": _with_header(b'{"x":' * (2 << 20)),
    "nested": _with_header(b"[" * (1 << 20)),
    "product": _with_header(_shape([1 << 61, 1 << 61], 0, 64)),
    "negative": _with_header(_shape([16], -64, 0)),
    "beyond": _with_header(_shape([1 << 40], 0, 1 << 42)),
    "overlap": _with_header(_shape([4], 8, 24)),
}
# By the adapter's name: files beside its weights.
_TEMPLATES = {
    "power": "{{ 9**(9**9) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "long": "{{ 'a' * 20000000 }}",
    "greedy": "{% set x = 'a' * 1000000000 %}{{ x | length }}",
    "escape": "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
}


def write_bombs(base: Path, root: Path, mark: Path) -> None:
    """Write all adapters below ``root``, each under many names; ``mark``: a file none may make."""
    for name, content in _WEIGHTS.items():
        folder = write_formula_adapter(base, root / name, rank=1, seed=1)
        (folder / "adapter_model.safetensors").write_bytes(content)
    for name, text in _TEMPLATES.items():
        folder = write_formula_adapter(base, root / name, rank=1, seed=2)
        (folder / "chat_template.jinja").write_text(text.replace("MARK", str(mark)))
    _write_rank(write_formula_adapter(base, root / "rank", rank=1, seed=3))
    _write_pickle(write_formula_adapter(base, root / "pickle", rank=1, seed=4))
    tokenizer = write_formula_adapter(base, root / "tokenizer", rank=1, seed=5)
    (tokenizer / "tokenizer.json").write_bytes(b"[" * (40 << 20))
    (root / "link").symlink_to(root.parent / "outside")
    for name in [*_WEIGHTS, *_TEMPLATES, "rank", "pickle", "tokenizer"]:
        for number in range(NUM_NAMES):
            (root / f"{name}-{number}").symlink_to(name)


def _write_rank(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 1_000_000_000}))


def _write_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.ones(2)}, folder / "adapter_model.bin")


def assaults(root: Path, port: int) -> list[Assault]:
    """Return all kinds; ``port`` of this machine is one that no server may call."""
    return [*_broken_adapters(), *_templates(), *_names(root, port), *_grammars(port)]


def _generate(adapter: str, source: str = "local", **more: Any) -> Body:
    own = {"adapter_id": adapter, "adapter_source": source, "max_new_tokens": 2}
    return {"inputs": "Hello", "parameters": own | more}


def _broken_adapters() -> list[Assault]:
    words = dict.fromkeys(_WEIGHTS, "adapter_model.safetensors is damaged")
    words |= {
        "header": r"has a header of \d+ bytes; the limit is \d+",
        "rank": "rank 1000000000; the limit is",
        "pickle": "pickle files can run code",
        "tokenizer": r"tokenizer.json has \d+ bytes; the limit is \d+",
    }
    return [_adapter(name, said) for name, said in words.items()]


def _adapter(name: str, words: str) -> Assault:
    def body(number: int) -> Body:
        return _generate(f"{name}-{number % NUM_NAMES}")

    return Assault(f"adapter: {name}", "/generate", body, words)


def _templates() -> list[Assault]:
    return [_template(name) for name in _TEMPLATES]


def _template(name: str) -> Assault:
    def body(number: int) -> Body:
        return _generate(f"{name}-{number % NUM_NAMES}", apply_chat_template=True)

    # Of one that ran over twice the answer is that it is not tried for a while.
    return Assault(f"template: {name}", "/generate", body, "the chat template of adapter")


def _names(root: Path, port: int) -> list[Assault]:
    paths = [
        "../outside", f"{root}/../outside", "link", "./x/../../outside", "/proc/self/root/etc",
        str(root.parent / "outside"), "%2e%2e/outside", "..",
    ]  # fmt: skip
    here = f"127.0.0.1:{port}"
    addresses = [
        f"http://{here}/x", f"me:pw@{here}/x", f"{here}/x", f"//{here}/x", f"org/x?y=http://{here}",
    ]  # fmt: skip
    refused = "outside the folders|is no folder below|is a file"
    no_hub = "is not a hub id|takes no adapters from S3|outside the folders|is no folder below"
    fields = {"hub_endpoint": f"http://{here}", "api_base": f"http://{here}", "HF_ENDPOINT": here}

    def address(number: int) -> Body:
        source = ("hub", "s3", "local")[number % 3]
        return _generate(addresses[number % len(addresses)], source, **fields)

    def path(number: int) -> Body:
        return _generate(paths[number % len(paths)])

    return [
        Assault("traversal and links", "/generate", path, refused),
        Assault("names that are addresses", "/generate", address, no_hub),
    ]


def _grammars(port: int) -> list[Assault]:
    bombs: dict[str, Callable[[int], Any]] = {
        "regex": lambda n: {"type": "string", "pattern": f"^(((a{{{900 + n}}}){{900}}){{900}})$"},
        "oversized": lambda n: {"enum": [f"{n} {each} " + "x" * 60 for each in range(5000)]},
        "nested": _nested,
        "reference elsewhere": lambda n: {"$ref": f"http://127.0.0.1:{port}/{n}"},
        "reference without end": lambda n: {"title": str(n), "$ref": "#"},
    }  # fmt: skip
    return [
        *(_grammar(name, schema) for name, schema in bombs.items()),
        # It can be computed, step by step, and is.
        _grammar("many states", _many_states, "choices", 200),
    ]


def _many_states(number: int) -> Any:
    return {"type": "string", "pattern": f"^{'(a?b?)' * (number % 9)}(a|b)*a(a|b){{60000}}$"}


def _nested(number: int) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(150):
        schema = {"type": "array", "items": schema, "minItems": number + 1, "maxItems": 10**9}
    return schema


def _grammar(
    name: str, schema: Callable[[int], Any], words: str = "`response_format`: ", status: int = 400
) -> Assault:
    def body(number: int) -> Body:
        bound = {"name": "bomb", "schema": schema(number)}
        return {
            "model": "base", "max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}],
            "response_format": {"type": "json_schema", "json_schema": bound},
        }  # fmt: skip

    return Assault(f"grammar: {name}", "/v1/chat/completions", body, words, (status,))
