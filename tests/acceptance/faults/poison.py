"""One request of 32 that makes its step fail, or the process, or has no numbers: it alone ends."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tests.acceptance.faults.crowd import Heard, converse, requests
from tests.acceptance.faults.server import events, faulty_server
from tests.acceptance.harness import Result
from tests.helpers.default_model import default_model_dir
from tests.helpers.formula_adapters import write_formula_adapter
from tokenizers import Tokenizer

NUM = 32
PLANTED = Path(__file__).with_name("planted")
# Said by nobody else.
_MARK = "☠☢☣"


def _marked() -> dict[str, Any]:
    return {
        "model": "pirate", "max_tokens": 24, "stream": True, "temperature": 0.0,
        "messages": [{"role": "user", "content": f"What is {_MARK}?"}],
    }  # fmt: skip


def _environment(kind: str) -> dict[str, str]:
    """Return what plants a fault; the ids within a text are those that the mark has alone."""
    tokenizer = Tokenizer.from_file(str(default_model_dir() / "tokenizer.json"))
    ids = tokenizer.encode(_MARK).ids[1:-1]
    return os.environ | {
        "PYTHONPATH": str(PLANTED), "PLANTED_KIND": kind, "PLANTED_IDS": ",".join(map(str, ids)),
    }  # fmt: skip


def overflowing(folder: Path) -> Path:
    """Write an adapter whose weights are numbers, and what it computes is none."""
    adapter = write_formula_adapter(default_model_dir(), folder / "overflowing", rank=4, seed=1)
    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor * 1e30 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return adapter


def _beside(url: str, poison: dict[str, Any]) -> tuple[list[bool], Heard]:
    """Return which of the others are as they are without the poison, and what came of that."""
    others = requests(NUM - 1)
    alone = converse(url, others)
    heard = converse(url, [*others[:11], poison, *others[11:]])
    ended = heard.pop(11)
    return [each.equals(alone[number]) for number, each in enumerate(heard)], ended


def _result(right: list[bool], ended: Heard, more: str, *, ok: bool) -> Result:
    figure = f"{sum(right)} of {len(right)} others right; the one: {ended.error[:220]!r}; {more}"
    return Result(all(right) and bool(ended.error) and ok, figure)


def point_failing_pass() -> Result:
    """Its forward pass raises: computed again in halves."""
    with faulty_server(env=_environment("raise")) as server:
        right, ended = _beside(server.url, _marked())
        num_lost, code = len(events(server, "shards_lost")), server.stop()
    more = f"shards lost {num_lost} times; exit code {code}"
    return _result(right, ended, more, ok="planted fault" in ended.error and num_lost == code == 0)


def point_deadly() -> Result:
    """It kills the process, each time that it is computed."""
    with faulty_server(env=_environment("kill")) as server:
        right, ended = _beside(server.url, _marked())
        num_lost, code = len(events(server, "shards_lost")), server.stop()
    more = f"shards lost {num_lost} times; exit code {code}"
    return _result(right, ended, more, ok=1 <= num_lost <= 4 and code == 0)


def point_no_numbers() -> Result:
    """Its adapter's numbers overflow: the row ends, and the third one has the adapter quarantined."""
    with tempfile.TemporaryDirectory() as name:
        adapter = overflowing(Path(name))
        poison = _marked() | {"model": str(adapter)}
        with faulty_server("--adapter-local-root", name) as server:
            right, ended = _beside(server.url, poison)
            errors = [converse(server.url, [poison])[0].error for _ in range(3)]
            code = server.stop()
    is_named = adapter.name in ended.error and "no finite numbers" in ended.error
    is_quarantined = "load it again" in errors[-1]
    more = f"then {errors[-1][:160]!r}; exit code {code}"
    return _result(right, ended, more, ok=is_named and is_quarantined and code == 0)
