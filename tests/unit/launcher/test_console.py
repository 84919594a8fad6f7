"""What people and log collectors see."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from lorax_launcher.console import Console, parse_record, printable, readable
from lorax_launcher.display import PlainDisplay, amount
from lorax_launcher.ready import reachable, ready_lines

RECORD = {"ts": 0.5, "level": "warning", "logger": "x", "message": "low memory"}


def shown(*lines: str, **options: Any) -> list[str]:
    stream = io.StringIO()
    console = Console(stream, **options)
    for line in lines:
        console.child_line("shard-0", line)
    return stream.getvalue().splitlines()


def test_a_record_becomes_one_readable_line() -> None:
    (line,) = shown(json.dumps({**RECORD, "rank": 0, "blocks": 7}))
    assert line.endswith("WARNING shard-0  low memory  blocks=7")
    assert "\x1b" not in line


def test_a_record_stays_json_with_its_process_named() -> None:
    (line,) = shown(json.dumps(RECORD), json_output=True)
    assert json.loads(line) == {**RECORD, "process": "shard-0"}


def test_other_output_is_passed_on_tagged() -> None:
    assert shown("Killed", "", "{broken", "[1]") == [
        "shard-0 | Killed",
        "shard-0 | {broken",
        "shard-0 | [1]",
    ]


def test_other_output_is_wrapped_in_json_mode() -> None:
    (line,) = shown("Killed", json_output=True)
    record = json.loads(line)
    assert (record["message"], record["process"]) == ("Killed", "shard-0")


@pytest.mark.parametrize("line", ["{}", '{"message": 3}', "[1]", "{", "plain", '"text"'])
def test_only_records_are_records(line: str) -> None:
    assert parse_record(line) is None


def test_colours_are_for_terminals() -> None:
    assert "\x1b[33m" in readable("router", RECORD, colour=True)


def test_a_message_cannot_steer_the_terminal() -> None:
    line = readable("router", {**RECORD, "message": "a\x1b[2Jb\nc\r", "id": "x\x07"})
    assert "\x1b" not in line
    assert "\n" not in line
    assert "\x07" not in line
    assert printable("é漢") == "é漢"


def test_an_exception_keeps_its_lines() -> None:
    lines = readable("router", {**RECORD, "exception": "Traceback\n  boom"}).splitlines()
    assert lines[1:] == ["Traceback", "  boom"]


def test_odd_values_do_not_break_the_output() -> None:
    line = readable("router", {"message": "m", "ts": "soon", "level": 3, "more": {"a": [1]}})
    assert '"a": [1]' in line


def progress(done: float, total: float | None, task: str = "convert") -> str:
    event = {"event": "progress", "task": task, "done": done, "total": total, "unit": "bytes"}
    return json.dumps({**RECORD, **event})


def test_plain_progress_is_a_line_now_and_then() -> None:
    now, reports = [0.0], []
    display = PlainDisplay(io.StringIO(), report=reports.append, clock=lambda: now[0])
    for second in range(12):
        now[0] = float(second)
        display.progress("fetch", second, 11, "files")
    assert reports == [
        "fetch: 0 of 11 files (0 %)",
        "fetch: 5 of 11 files (45 %)",
        "fetch: 10 of 11 files (91 %)",
        "fetch: 11 of 11 files (100 %)",
    ]


def test_progress_of_a_child_is_said_in_words() -> None:
    lines = shown(progress(1e6, 4e6), progress(2e6, 4e6), progress(4e6, 4e6))
    assert [line.split("launcher ")[1] for line in lines] == [
        "shard-0 convert: 1.0 of 4.0 MB (25 %)",
        "shard-0 convert: 4.0 of 4.0 MB (100 %)",
    ]


def test_progress_is_a_record_in_json_mode() -> None:
    (line,) = shown(progress(1, 4), json_output=True)
    assert json.loads(line)["done"] == 1


@pytest.mark.parametrize(
    ("done", "total", "unit", "words"),
    [(3, None, "layers", "3 layers"), (3, 0, "", "3"), (5e5, 1e6, "B", "0.5 of 1.0 MB (50 %)")],
)
def test_amount(done: float, total: float | None, unit: str, words: str) -> None:
    assert amount(done, total, unit) == words


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_updating_line_and_loses_it_at_the_end() -> None:
    stream = Terminal()
    console = Console(stream)
    console.child_line("prepare", progress(1e6, 4e6))
    console.info("meanwhile")
    console.child_line("prepare", progress(2e6, 4e6, task="check"))
    console.child_line("prepare", progress(4e6, 4e6, task="check"))
    console.close()
    text = stream.getvalue()
    assert "prepare convert" in text
    assert "prepare check" in text
    assert "meanwhile" in text
    assert text.endswith("\x1b[?25h") or "\x1b[2K" in text


def test_a_reader_that_went_away_does_not_stop_the_server() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    console = Console(Gone())
    console.info("one")
    console.info("two")


def test_the_level_holds_for_the_launchers_own_lines() -> None:
    stream = io.StringIO()
    console = Console(stream, level="error")
    console.info("quiet")
    console.error("loud")
    assert "quiet" not in stream.getvalue()
    assert "loud" in stream.getvalue()


def test_the_ready_line_and_its_request() -> None:
    ready, curl = ready_lines("http://0.0.0.0:3000", "org/name")
    assert ready == (
        "Ready: org/name answers on http://localhost:3000 "
        "(all machines that reach it, no pages of other origins)"
    )
    assert curl.startswith("curl http://localhost:3000/generate ")
    body = json.loads(curl.split("-d ")[1].strip("'"))
    assert body["parameters"]["apply_chat_template"] is True


@pytest.mark.parametrize(
    ("tasks", "path"),
    [
        (["generate", "embed"], "/generate"),
        (["generate", "embed", "classify"], "/generate"),
        (["embed"], "/embed"),
        (["embed", "classify"], "/classify"),
    ],
)
def test_the_request_to_copy_is_one_that_the_model_answers(tasks: list[str], path: str) -> None:
    curl = ready_lines("http://0.0.0.0:3000", "org/name", tasks=tasks)[-1]
    assert curl.startswith(f"curl http://localhost:3000{path} ")
    assert json.loads(curl.split("-d ")[1].strip("'"))["inputs"]


@pytest.mark.parametrize(
    ("url", "origins", "words"),
    [
        ("http://127.0.0.1:3000", [], "(this machine only, no pages of other origins)"),
        ("http://[::1]:3000", ["*"], "(this machine only, pages of any origin)"),
        ("http://10.0.0.7:80", ["https://a.b"], "(all who reach 10.0.0.7, pages of https://a.b)"),
    ],
)
def test_the_ready_line_says_who_may_call(url: str, origins: list[str], words: str) -> None:
    assert ready_lines(url, "m", origins=origins)[0].endswith(words)


def test_the_ready_line_says_where_adapters_are_managed() -> None:
    _, unix, port, _ = ready_lines(
        "http://127.0.0.1:1", "m", admin=["unix:/run/a b/admin", "http://127.0.0.1:3001"]
    )
    assert unix == (
        "Adapters are managed with curl --unix-socket '/run/a b/admin' http://localhost/v1/adapters"
    )
    assert port == (
        "Adapters are managed on http://127.0.0.1:3001/v1/adapters, from this machine only"
    )


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://[::]:80", "http://[::1]:80"),
        ("http://10.0.0.7:80/", "http://10.0.0.7:80"),
        ("http://host:1", "http://host:1"),
    ],
)
def test_addresses_a_client_can_use(url: str, expected: str) -> None:
    assert reachable(url) == expected


def test_a_phase_is_a_line_or_a_spinner() -> None:
    plain, terminal = io.StringIO(), Terminal()
    Console(plain).phase("loading the model")
    console = Console(terminal)
    console.phase("loading the model")
    console.say(["Ready: here"])
    assert plain.getvalue().endswith("loading the model\n")
    assert "loading the model" in terminal.getvalue()
    assert terminal.getvalue().rstrip().endswith("Ready: here")


def test_numbers_are_cut_to_what_a_person_reads() -> None:
    line = readable("shard-0", {**RECORD, "ms": {"torch": [62.138644]}, "share": 0.123456789})
    assert line.endswith('ms={"torch": [62.14]} share=0.1235')
