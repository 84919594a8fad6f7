"""What a command does with a system: warm-up, turns, sweeps; what does not go together is told."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from tests.unit.bench.scripted_server import OK, Connection, Script, completion, scripted

from lorax_bench import sweeps
from lorax_bench.adapters import linears, write_adapters
from lorax_bench.apis import OpenAI
from lorax_bench.cli import main
from lorax_bench.drive import Target
from lorax_bench.requests import Workload
from lorax_bench.session import NoAnswerError, Variant, take_turns, warm_up
from lorax_bench.systems import AskedSystem, SystemOptions, SystemOptionsError, decoder
from lorax_bench.workloads import LoadOptions, build

CONFIG = {
    "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3, "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}  # fmt: skip


@contextmanager
def served(script: Script) -> Iterator[str]:
    """Serve a script from a thread with a loop of its own."""
    loop, ready, url = asyncio.new_event_loop(), threading.Event(), []

    async def serve() -> None:
        async with scripted(script) as where:
            url.append(where)
            ready.set()
            await ended.wait()

    ended = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield url[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


class Answers:
    """A script that answers everything, and remembers what was asked."""

    def __init__(self, refused: str = "") -> None:
        self.asked: list[tuple[str, tuple[int, ...], int]] = []
        self._refused = refused

    async def __call__(self, connection: Connection) -> None:
        body = connection.body
        self.asked.append((body["model"], tuple(body["prompt"]), body["max_tokens"]))
        if body["model"] == self._refused:
            await connection.whole("404 Not Found", b'{"error": {"message": "no such model"}}')
            return
        await connection.raw(OK)
        for number in range(1, body["max_tokens"] + 1):
            await connection.chunk(completion("x", number))
        await connection.chunk(b"")


def system_at(url: str) -> AskedSystem:
    api = OpenAI(model="base", adapters=("a", "b"))
    return AskedSystem(name="test", target=Target(url=url, api=api), last_id=500)


def variant(name: str, **options: int) -> Variant:
    load = LoadOptions(**options)  # type: ignore[arg-type]
    return Variant(
        name=name,
        workload=lambda number: build("fixed,requests=3,prompt=5,output=2", options=load, number=number),
    )  # fmt: skip


def test_the_base_and_each_adapter_are_warm_before_a_run() -> None:
    script = Answers()
    with served(script) as url:
        warm_up(system_at(url), 2)
    assert {model for model, _, _ in script.asked} == {"base", "a", "b"}
    assert max(i for _, prompt, _ in script.asked for i in prompt) <= 500


def test_a_server_that_answers_nothing_is_found_before_a_run() -> None:
    async def refuse(connection: Connection) -> None:
        await connection.whole("401 Unauthorized", b'{"error": {"message": "no key"}}')

    with served(refuse) as url, pytest.raises(NoAnswerError, match="HTTP 401: no key"):
        warm_up(system_at(url), 1)


def test_variants_take_turns_with_prompts_of_their_own_each_round() -> None:
    script = Answers()
    with served(script) as url:
        runs = take_turns(
            system_at(url), [variant("base"), variant("two", adapters=2)], 2, warm_rounds=1
        )
    assert [(run.variant, run.round) for run in runs] == [
        ("base", 1), ("two", 1), ("base", 2), ("two", 2),
    ]  # fmt: skip
    assert all(run.figures.num_output_tokens == 6 for run in runs)
    assert [sorted(run.adapters) for run in runs] == [[], ["0", "1"]] * 2
    assert len(script.asked) == 18
    assert len({prompt for _, prompt, _ in script.asked}) == 9


def test_levels_double() -> None:
    assert sweeps.levels(1) == [1]
    assert sweeps.levels(20) == [1, 2, 4, 8, 16]


def test_rates_lie_evenly_between_slow_and_fast() -> None:
    assert sweeps.rates_between(1.0, 3.0, 4) == [1.5, 2.0, 2.5, 3.0]
    assert sweeps.rates_between(2.0, 1.0, 2) == [2.0, 2.0]


def test_a_level_has_as_many_requests_as_show_it() -> None:
    load = build("fixed,requests=100,prompt=4,output=1")
    assert [len(sweeps.shortened(load, level).requests) for level in (1, 4, 64)] == [8, 12, 100]


def test_a_sweep_without_rates_finds_them_from_the_slowest_and_the_fastest_way() -> None:
    seen: list[tuple[int | None, float | None]] = []

    def at(number: int, concurrency: int | None, rate: float | None) -> Workload:
        seen.append((concurrency, rate))
        return build(
            "fixed,requests=8,prompt=4,output=2", number=number,
            options=LoadOptions(concurrency=concurrency or 0),
        )  # fmt: skip

    with served(Answers()) as url:
        rates, runs = sweeps.find_rates(system_at(url), at, 3)
    assert seen == [(1, None), (None, None)]
    assert len(rates) == 3
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(max(run.figures.requests_per_s for run in runs))


def invoke(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(words))
    return done.exit_code, done.output


def test_a_run_writes_all_that_it_is_asked_for_and_can_be_shown_again(tmp_path: Path) -> None:
    paths = {kind: str(tmp_path / f"r.{kind}") for kind in ("json", "png", "html")}
    written = [word for kind, path in paths.items() for word in (f"--{kind}", path)]
    with served(Answers()) as url:
        code, text = invoke(
            "run", "fixed,requests=4,prompt=5,output=3", "--url", url, "--model", "base",
            "--adapters", "2", "--adapter", "a", "--adapter", "b", "--retention", "--rounds", "2",
            "--name", "a server", *written,
        )  # fmt: skip
    assert code == 0, text
    assert "retention" in text
    document = json.loads(Path(paths["json"]).read_text())
    assert [run["variant"] for run in document["runs"]] == ["base", "2 adapters"] * 2
    assert {"cpu", "cores", "memory"} <= set(document["machine"])
    assert "lorax-py" in document["versions"]
    assert document["runs"][0]["peak_memory_bytes"] is None
    again = str(tmp_path / "again.html")
    code, text = invoke("report", paths["json"], "--html", again, "--by-adapter")
    assert code == 0, text
    assert text.count("by adapter") == 2
    for path in (paths["html"], again):
        assert "2 adapters" in Path(path).read_text()


def test_a_sweep_has_a_line_for_each_level() -> None:
    with served(Answers()) as url:
        code, text = invoke(
            "sweep", "fixed,requests=6,prompt=5,output=2", "--url", url, "--model", "base",
            "--concurrency", "1,3", "--rounds", "1",
        )  # fmt: skip
    assert code == 0, text
    assert levels_of(text) == ["1", "3"]


def levels_of(text: str) -> list[str]:
    """Return the column of concurrency."""
    rows = [line.split("│") for line in text.splitlines() if line.startswith("│")]
    return [row[2].strip() for row in rows if row[2].strip()]


def test_a_failed_request_shows_in_the_exit_code_and_in_words() -> None:
    with served(Answers(refused="b")) as url:
        code, text = invoke(
            "run", "fixed,requests=4,prompt=5,output=2", "--url", url, "--model", "base",
            "--adapters", "2", "--adapter", "a", "--adapter", "b", "--rounds", "1",
        )  # fmt: skip
    assert code == 1
    assert "2 x HTTP 404: no such model" in text


def test_no_ratio_is_made_of_nothing() -> None:
    with served(Answers(refused="base")) as url:
        code, text = invoke(
            "run", "fixed,requests=2,prompt=5,output=2", "--url", url, "--model", "base",
            "--adapters", "1", "--adapter", "a", "--rounds", "1", "--retention",
        )  # fmt: skip
    assert code == 1
    assert "base: 2 x HTTP 404: no such model" in text
    assert "retention" not in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "w2"], "there is no workload"),
        (["run", "w1", "--retention"], "--adapters"),
        (["run", "w1", "--adapter", "a"], "--url"),
        (["run", "w1", "--url", "http://127.0.0.1:9", "--adapters", "1"], "--adapter names 0"),
        (["run", "w1", "--url", "http://127.0.0.1:9", "--", "--port", "1"], "leave --url out"),
        (["run", "w1", "--url", "http://127.0.0.1:9"], "does not answer"),
        (["run", "w1", "--url", "http://127.0.0.1:9", "--api", "lorax"], "--tokenizer"),
        (["run", "w1", "--url", "http://127.0.0.1:9", "--model", "m"], "answered no request"),
        (["sweep", "w1", "--concurrency", "1,x"], "is not a list"),
        (["sweep", "w1", "--rate", "0"], "not above 0"),
        (["sweep", "w1", "--rate", "1", "--concurrency", "1"], "take one"),
        (["report", __file__], "holds no results"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(words: list[str], told: str) -> None:
    code, text = invoke(*words)
    assert code != 0
    assert told in text
    assert "Traceback" not in text


def without_the_client(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.modules['aiohttp'] = None\nfrom lorax_bench.cli import main; main()"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_package_that_is_missing_is_told_in_a_line() -> None:
    for command in (("run", "w1"), ("sweep", "w1"), ("compare",)):
        done = without_the_client(*command)
        assert done.returncode == 1
        assert "lorax-bench needs aiohttp: install lorax-py[bench]" in done.stderr
        assert "Traceback" not in done.stderr


def test_help_needs_no_client() -> None:
    for command in ((), ("run",), ("report",), ("workloads",)):
        assert without_the_client(*command, "--help").returncode == 0


def test_workloads_are_listed_with_what_they_take() -> None:
    code, text = invoke("workloads")
    assert code == 0
    assert "w1: " in text
    assert "prompt=8-512" in text


def test_adapters_fit_the_model_and_differ(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    first, second = write_adapters(tmp_path, tmp_path / "made", 2, ranks=(2, 4), dtype="float16")
    tensors = load_file(second / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    key = "base_model.model.model.layers.1.self_attn.k_proj"
    assert tensors[f"{key}.lora_A.weight"].shape == (4, 12)
    assert tensors[f"{key}.lora_B.weight"].shape == (4, 4)
    assert {str(each.dtype) for each in tensors.values()} == {"float16"}
    config = json.loads((first / "adapter_config.json").read_text())
    assert (config["r"], len(config["target_modules"])) == (2, 7)


def test_adapters_of_another_kind_of_model_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size"):
        linears({"n_embd": 12})


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(SystemOptionsError, match=r"t\.json"):
        decoder(tmp_path / "t.json")


def test_system_options_for_our_own_server_take_none_of_another() -> None:
    SystemOptions(launcher_options=("--max-batch-size", "4")).check(8)
    with pytest.raises(SystemOptionsError):
        SystemOptions(adapters=("a",)).check(1)
