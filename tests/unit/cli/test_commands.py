"""``lorax-cli``: what is asked of a server, what is shown, and errors in the server's words."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.helpers.server import free_port
from tests.unit.cli.scripted import MODELS, chunks, serving

from lorax_cli import client
from lorax_cli.cli import main

LISTED = {
    "adapter_id": "pirate", "adapter_source": "local", "state": "resident", "rank": 8, "pinned": True,
}  # fmt: skip
REFUSED = {
    "adapter_id": "broken", "adapter_source": "hub", "state": "refused", "rank": None, "pinned": False,
    "error": {"message": "peft_type 'IA3' is not supported"},
}  # fmt: skip


def run(url: str, *words: str, said: str = "", **environment: str) -> Result:
    names = ("LORAX_URL", "LORAX_API_KEY", "LORAX_ADMIN", "LORAX_ADAPTER_TOKEN", "HF_TOKEN")
    cleared = {name: environment.get(name) for name in names}
    return CliRunner().invoke(main, ["--url", url, *words], input=said, env=cleared)


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that run on this machine have nothing to do with it."""
    monkeypatch.setattr(client, "admin_sockets", list)


def test_a_text_is_streamed_and_its_request_is_what_was_said() -> None:
    events = [{"choices": [{"text": word}]} for word in (" Paris", ".")]
    with serving({"/v1/models": [MODELS], "/v1/completions": [events]}) as (url, asked):
        done = run(url, "generate", "The capital is", "--max-tokens", "5", "--seed", "3")
    assert (done.output, done.exit_code) == (" Paris.\n", 0)
    assert asked.bodies == [
        {
            "model": "the-base", "prompt": "The capital is", "max_tokens": 5, "seed": 3,
            "stream": True, "stream_options": {"include_usage": True},
        }
    ]  # fmt: skip


def test_a_message_takes_schema_adapter_and_key(tmp_path: Path) -> None:
    schema = tmp_path / "person.json"
    schema.write_text('{"type": "object"}')
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    words = ["--chat", "--adapter", "local:pirate", "--schema", str(schema), "--stats"]
    with serving({"/v1/chat/completions": [chunks("{ }", usage)]}) as (url, asked):
        done = run(url, "generate", "-", *words, said="Who?", LORAX_API_KEY="sk-1")
    assert done.stdout == "{}\n"
    assert "9 + 2 tokens, 4 of them cached" in done.stderr
    (body,) = asked.bodies
    assert (body["model"], body["messages"]) == (
        "local:pirate",
        [{"role": "user", "content": "Who?"}],
    )
    form = {"name": "person", "schema": {"type": "object"}}
    assert body["response_format"] == {"type": "json_schema", "json_schema": form}
    assert asked.keys == ["Bearer sk-1"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, {"error": {"message": "there is no model 'x'"}}), "there is no model 'x'"),
        ((422, {"error": "max_tokens is too large", "error_type": "validation"}), "is too large"),
        ((401, {"error": {"message": "no such key"}}), "no such key (--api-key, or LORAX_API_KEY)"),
        ((502, ["not a document"]), "the server answered 502 Bad Gateway"),
        ([{"error": {"message": "the adapter failed"}}], "the adapter failed"),
    ],
)
def test_errors_are_in_the_servers_words(answer: Any, words: str) -> None:
    with serving({"/v1/completions": [answer]}) as (url, _):
        done = run(url, "generate", "x", "--adapter", "a")
    assert done.exit_code == 1
    assert f"Error: {words}" in done.stderr or words in done.stderr
    assert "Traceback" not in done.output


def test_nobody_there_is_said() -> None:
    done = run(f"127.0.0.1:{free_port()}", "adapters", "list")
    assert done.exit_code == 1
    assert "no server answers at http://127.0.0.1:" in done.stderr
    assert "--url says where" in done.stderr


def test_a_schema_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text("{")
    with serving({"/v1/models": [MODELS]}) as (url, _):
        done = run(url, "generate", "x", "--schema", str(path))
    assert f"{path} is not JSON" in done.stderr


def test_all_pages_of_adapters_are_listed() -> None:
    pages = [
        {"adapters": [LISTED], "next_cursor": "c1"}, {"adapters": [REFUSED], "next_cursor": None},
    ] * 2  # fmt: skip
    with serving({"/v1/adapters": pages}) as (url, asked):
        shown = run(url, "adapters", "list", "--source", "hub")
        lines = run(url, "adapters", "list", "--json").output.splitlines()
    first, pirate, broken = shown.output.splitlines()
    assert first.split() == ["adapter", "source", "state", "rank", "pinned", "why"]
    assert pirate.split() == ["pirate", "local", "resident", "8", "yes"]
    assert broken.split(None, 3) == ["broken", "hub", "refused", "peft_type 'IA3' is not supported"]
    assert asked.paths[:2] == [
        "/v1/adapters?adapter_source=hub", "/v1/adapters?adapter_source=hub&cursor=c1",
    ]  # fmt: skip
    assert [json.loads(line) for line in lines] == [LISTED, REFUSED]


def test_a_server_without_adapters_says_so() -> None:
    with serving({"/v1/adapters": [{"adapters": [], "next_cursor": None}]}) as (url, _):
        assert "no adapter is known yet" in run(url, "adapters", "list").output


@pytest.mark.parametrize("verb", ["load", "pin", "unpin", "reload", "unload"])
def test_adapters_are_managed_with_a_key_where_clients_ask(verb: str) -> None:
    with serving({f"/v1/adapters/{verb}": [{}]}) as (url, asked):
        done = run(url, "adapters", verb, "org/a", "--source", "hub", LORAX_API_KEY="sk-admin")
    assert (done.exit_code, asked.keys) == (0, ["Bearer sk-admin"])
    assert done.output.startswith("org/a ")
    assert asked.bodies == [{"adapter_id": "org/a", "adapter_source": "hub"}]


def test_adapters_are_managed_at_an_address_that_is_named() -> None:
    with serving({"/v1/adapters/load": [{}]}) as (admin, asked):
        done = run(
            "127.0.0.1:1", "--admin", admin, "adapters", "load", "a", LORAX_ADAPTER_TOKEN="hf_x"
        )
    assert done.exit_code == 0, done.output
    assert asked.bodies == [{"adapter_id": "a", "api_token": "hf_x"}]
    # A key is for the server, not for whoever else is named.
    assert asked.keys == [None]


def test_a_token_of_the_environment_s_own_stays_there() -> None:
    """It opens all that its owner may see, and was not given for this server."""
    with serving({"/v1/adapters/load": [{}]}) as (admin, asked):
        done = run("127.0.0.1:1", "--admin", admin, "adapters", "load", "a", HF_TOKEN="hf_x")
    assert (done.exit_code, asked.bodies) == (0, [{"adapter_id": "a"}])


@pytest.mark.parametrize(
    ("sockets", "words"),
    [([], "none is there"), (["/a/admin", "/b/admin"], "/a/admin, /b/admin are")],
)
def test_without_a_key_one_socket_has_to_be_there(
    sockets: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "admin_sockets", lambda: [Path(each) for each in sockets])
    done = run("127.0.0.1:1", "adapters", "load", "a")
    assert done.exit_code == 1
    assert words in done.stderr
    assert "--admin" in done.stderr


def test_only_sockets_that_somebody_listens_on_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(client.tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("lorax-1", "lorax-2", "lorax-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "lorax-3" / "admin").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "lorax-1" / "admin"))
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(tmp_path / "lorax-2" / "admin"))
        alive.listen()
        assert client.admin_sockets() == [tmp_path / "lorax-2" / "admin"]


# --- chat ---------------------------------------------------------------------------


def say(*lines: str, answers: int) -> tuple[Result, list[dict[str, Any]]]:
    replies = [chunks(f"reply {number}") for number in range(answers)]
    scripted: dict[str, list[Any]] = {"/v1/models": [MODELS] * 9, "/v1/chat/completions": replies}
    with serving(scripted) as (url, asked):
        done = run(url, "chat", "--temperature", "0", said="\n".join(lines) + "\n")
    return done, asked.bodies


def roles(body: dict[str, Any]) -> list[str]:
    return [f"{each['role']}: {each['content']}" for each in body["messages"]]


def test_a_conversation_keeps_what_was_said_and_changes_adapters() -> None:
    done, bodies = say("Hello", "/adapter pirate", "And you?", "/adapter", "Bye", answers=3)
    assert done.exit_code == 0
    assert [body["model"] for body in bodies] == ["the-base", "pirate", "the-base"]
    assert roles(bodies[2]) == [
        "user: Hello", "assistant: reply0", "user: And you?", "assistant: reply1", "user: Bye",
    ]  # fmt: skip
    assert all(body["temperature"] == 0 for body in bodies)
    assert "reply2" in done.output


def test_an_answer_is_made_anew_by_another_adapter() -> None:
    done, bodies = say("Hello", "/adapter pirate", "/again", "More", answers=3)
    assert roles(bodies[1]) == ["user: Hello"]
    assert bodies[1]["model"] == "pirate"
    assert roles(bodies[2]) == ["user: Hello", "assistant: reply1", "user: More"]


def test_what_the_model_is_told_and_what_is_forgotten() -> None:
    _, bodies = say("/system Be brief.", "Hello", "/reset", "/system", "Anew", answers=2)
    assert roles(bodies[0]) == ["system: Be brief.", "user: Hello"]
    assert roles(bodies[1]) == ["user: Anew"]


def test_words_that_are_none_ask_nobody() -> None:
    done, bodies = say("/foo", "/again", "/help", "/adapters", "/quit", "Hello", answers=0)
    assert bodies == []
    assert "/foo is none of the words" in done.output
    assert "nothing was said yet" in done.output
    assert "/adapter NAME" in done.output
    assert "pirate" in done.output


def test_a_message_that_failed_is_not_part_of_the_conversation() -> None:
    answers: dict[str, list[Any]] = {
        "/v1/models": [MODELS],
        "/v1/chat/completions": [(503, {"error": {"message": "too busy"}}), chunks("there")],
    }
    with serving(answers) as (url, asked):
        done = run(url, "chat", said="Hello\nHello again\n")
    assert "too busy" in done.output
    assert roles(asked.bodies[1]) == ["user: Hello again"]


def test_an_interrupt_stops_the_answer_and_not_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Hello", "More"])

    def read(_prompt: str) -> str:
        return next(lines, "/quit")

    def stream_of(number: int) -> Callable[..., Any]:
        def stream(_self: Any, _path: str, body: dict[str, Any]) -> Any:
            bodies.append(body)
            yield from chunks("well then")
            if len(bodies) == number:
                raise KeyboardInterrupt

        return stream

    bodies: list[dict[str, Any]] = []
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(client.Server, "stream", stream_of(1))
    with serving({"/v1/models": [MODELS]}) as (url, _):
        done = run(url, "chat")
    assert "; stopped" in done.output
    assert roles(bodies[1]) == ["user: Hello", "assistant: wellthen", "user: More"]
