"""Adapters that would stop everybody: each is asked for while others use the base model."""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.acceptance.adapter_fleet import serve
from tests.acceptance.beside import Seen, look
from tests.acceptance.crowd import Answer, ask_all, statuses
from tests.acceptance.harness import SHARED, Point, Result
from tests.acceptance.memory import MemoryWatch
from tests.helpers.default_model import default_model_dir
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.hub_stub import StubHub, running_hub
from tests.helpers.server import Server

MAX_RATIO = 2.0
# What router, renderers and fetchers may take beyond what they have when idle.
MAX_GROWN_MIB = 768
# An adapter of the attack is answered within this time, whatever the answer.
MAX_ANSWER_S = 60.0
NUM_ATTACKERS = 4
# Beside a line or two for each request.
MAX_LOG_LINES = 60
HANGING = "fleet/hanging"
HARMLESS = "harmless"


@dataclass(frozen=True, slots=True)
class Attack:
    """An adapter's files beside its weights, and how it is asked for."""

    title: str
    # Given the base model's folder: what to write beside the weights, by name.
    files: Callable[[Path], dict[str, str]]
    parameters: dict[str, Any] = field(default_factory=dict)
    # Changes to its configuration.
    config: dict[str, Any] = field(default_factory=dict)
    prompt: str = "a" * 32
    # How many at once; of one after another, four ask again and again.
    at_once: int = 0
    source: str = "local"
    # Statuses that say the right thing.
    allowed: tuple[int, ...] = (422, 424)

    @property
    def is_served(self) -> bool:
        """Whether its requests compute: then they are compared with a harmless adapter's."""
        return self.allowed == (200,)


def _template(text: str) -> Callable[[Path], dict[str, str]]:
    return lambda _base: {"chat_template.jinja": text}


def _growing_tokenizer(base: Path) -> dict[str, str]:
    document = json.loads((base / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    document["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 3}
    return {"tokenizer.json": json.dumps(document)}


def _own_tokenizer(base: Path) -> dict[str, str]:
    document = json.loads((base / "tokenizer.json").read_text())
    token = next(each for each in document["added_tokens"] if "repo" in each["content"])
    document["model"]["vocab"]["<customer>"] = document["model"]["vocab"].pop(token["content"])
    token["content"] = "<customer>"
    return {"tokenizer.json": json.dumps(document, indent=1)}


def _nothing(_base: Path) -> dict[str, str]:
    return {}


_CHAT = {"apply_chat_template": True}
_LOOPS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
_SLOW = r"(?=model\.layers\.29\.self_attn\.q_proj)mod(?:[a-z_.0-9]+)+!|.*\.(q_proj|v_proj)"
ATTACKS = {
    "T1": Attack("a constant power in a template, unasked", _template("{{ 9**(9**9) }}"),
                 allowed=(200,)),
    "T1c": Attack("the same, asked for", _template("{{ 9**(9**9) }}"), _CHAT),
    "T2": Attack("nested loops in a template", _template(_LOOPS), _CHAT),
    "T3": Attack("a gigabyte in a template",
                 _template("{% set x = 'a' * 1000000000 %}{{ x|length }}"), _CHAT),
    "T3t": Attack("a text of 20 MB", _template("{{ 'a' * 20000000 }}"), _CHAT),
    "T4": Attack("3,000 brackets", _template("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"), _CHAT),
    "T4i": Attack("400 nested ifs", _template("{% if 1 %}" * 400 + "{% endif %}" * 400), _CHAT,
                  allowed=(200, 422, 424)),
    "T5": Attack("a tokenizer that makes a billion letters of one", _growing_tokenizer),
    "T6": Attack("a pattern that takes minutes", _nothing, config={"target_modules": _SLOW}),
    "T7": Attack("a pattern that takes for ever", _nothing,
                 config={"target_modules": "(([a-z_0-9.])*)*!"}),
    "T8": Attack("1,100 requests for a hub that never answers", _nothing, at_once=1100,
                 source="hub", allowed=(424, 429, 503)),
    "T9": Attack("50 first requests for an adapter with a 2 MB tokenizer", _own_tokenizer,
                 at_once=50, allowed=(200,), prompt="Say something"),
}  # fmt: skip


def _write(attack: Attack, base: Path, folder: Path) -> None:
    write_formula_adapter(base, folder, rank=2, seed=1)
    for name, text in attack.files(base).items():
        (folder / name).write_text(text)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | attack.config))


class _Attackers:
    """Send an attack's requests until they are told that it is enough."""

    def __init__(self, url: str, attack: Attack, adapter_id: str) -> None:
        self.answers: list[Answer] = []
        self._url = url + "/generate"
        self._at_once = attack.at_once
        own = {"adapter_id": adapter_id, "adapter_source": attack.source, "max_new_tokens": 4}
        self._body = {"inputs": attack.prompt, "parameters": own | attack.parameters}
        self._enough = threading.Event()
        number = 1 if attack.at_once else NUM_ATTACKERS
        self._threads = [threading.Thread(target=self._work) for _ in range(number)]

    def _work(self) -> None:
        while not self._enough.is_set():
            self.answers += ask_all(self._url, [self._body] * (self._at_once or 1), MAX_ANSWER_S)
            if self._at_once:
                return
            # Refusals come at once: four who ask for ever would be a load test of their own.
            self._enough.wait(0.2)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()


def _run(server: Server, name: str, adapter_id: str) -> Result:
    """Measure before, beside and after one attack."""
    attack = ATTACKS[name]
    before = _quiet(server, attack, adapter_id)
    num_lines = len(server.lines)
    with MemoryWatch(server) as memory, _Attackers(server.url, attack, adapter_id) as attackers:
        beside = look(server.url)
    lines = len(server.lines) - num_lines
    after = _quiet(server, attack, adapter_id)
    return _judge(attack, before, beside, after, attackers.answers, memory, lines)


def _quiet(server: Server, attack: Attack, adapter_id: str) -> Seen:
    """Look at a server that is not attacked: idle, or asked as much for a harmless adapter."""
    if not attack.is_served:
        return look(server.url)
    harmless = str(Path(adapter_id).with_name(HARMLESS))
    with _Attackers(server.url, attack, harmless):
        return look(server.url)


def _judge(
    attack: Attack, before: Seen, beside: Seen, after: Seen, answers: list[Answer],
    memory: MemoryWatch, lines: int,
) -> Result:  # fmt: skip
    if not all(seen.intervals and seen.chats for seen in (before, beside, after)):
        return Result(False, "; ".join([*before.failures, *beside.failures, *after.failures]))
    quiet = [statistics.mean((getattr(before, k), getattr(after, k))) for k in ("p95", "ttft")]
    ratios = (beside.p95 / quiet[0], beside.ttft / quiet[1])
    failures = [*before.failures, *beside.failures, *after.failures]
    wrong = [each for each in answers if each.status not in attack.allowed]
    wordless = [each for each in answers if each.status >= 400 and '"error"' not in each.text]
    for each in [*wrong[:2], *wordless[:2]]:
        print(f"    not right: {each.status} {each.text[:300]}", flush=True)
    if answers:
        print(f"    one answer: {answers[-1].status} {answers[-1].text[:240]}", flush=True)
    ok = (
        not failures and not wrong and not wordless and bool(answers)
        and max(ratios) <= MAX_RATIO and memory.grown <= MAX_GROWN_MIB
        and lines <= MAX_LOG_LINES + 2 * len(answers)
    )  # fmt: skip
    figure = (
        f"p95 interval {quiet[0] * 1e3:.0f} -> {beside.p95 * 1e3:.0f} ms ({ratios[0]:.2f}x of "
        f"{len(beside.intervals)}), chat {quiet[1] * 1e3:.0f} -> {beside.ttft * 1e3:.0f} ms "
        f"({ratios[1]:.2f}x), health {max(beside.healths, default=0.0):.2f} s; {statuses(answers)}; "
        f"+{memory.grown} MiB; {lines} log lines; failures: {'; '.join(failures) or 'none'}"
    )
    return Result(ok, figure)


class _Stage:
    """One server for all attacks, one after another; started by the first."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._server: Server | None = None
        self._root = Path()

    def server(self) -> tuple[Server, Path]:
        """Return the running server and the folder of local adapters."""
        if self._server is None or self._server.process is None:
            SHARED.callback(self.close)
            base = default_model_dir()
            top = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            self._root = top / "adapters"
            hub = self._stack.enter_context(running_hub(StubHub()))
            for name, attack in ATTACKS.items():
                _write(attack, base, self._root / name)
            write_formula_adapter(base, self._root / HARMLESS, rank=2, seed=1)
            hub.repositories[HANGING] = {
                path.name: path.read_bytes() for path in (self._root / "T8").iterdir()
            }
            hub.seconds[HANGING] = float("inf")
            options = ("--max-concurrent-requests", "1024", "--adapter-timeout-s", "40")
            self._server = self._stack.enter_context(
                serve(hub, self._root, top / "store", *options)
            )
            look(self._server.url, 50)
        return self._server, self._root

    def close(self) -> None:
        """End the server; the next attack starts another."""
        self._stack.close()
        self._server = None


STAGE = _Stage()


def _point(name: str) -> Callable[[], Result]:
    def measure() -> Result:
        server, root = STAGE.server()
        adapter_id = HANGING if ATTACKS[name].source == "hub" else str(root / name)
        return _run(server, name, adapter_id)

    return measure


def point_alive() -> Result:
    """After all attacks: the first router still serves, and the server ends in good order."""
    server, _ = STAGE.server()
    assert server.process is not None
    seen = look(server.url, 50)
    start = time.perf_counter()
    code = server.stop()
    STAGE.close()
    ok = not seen.failures and code == 0
    return Result(
        ok, f"exit code {code} after {time.perf_counter() - start:.1f} s; {seen.failures}"
    )


def points() -> Iterator[Point]:
    """Yield a point for each attack, and one for what is left of the server."""
    for name, attack in ATTACKS.items():
        yield Point(name, attack.title, _point(name))
    yield Point("T", "after all of them the server serves and ends", point_alive)
