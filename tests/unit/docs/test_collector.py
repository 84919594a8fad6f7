"""Pages as texts: blocks and statements are found, and what cannot be run or is not there is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers import documented_names
from tests.helpers.documented_blocks import (
    ROOT,
    Block,
    Kind,
    blocks_of,
    faults,
    kind,
    program,
    statements,
)

PAGE = ROOT / "docs" / "page.md"


def block(code: str, language: str = "sh") -> Block:
    (found,) = blocks_of(f"# A page\n\n```{language}\n{code}\n```\n", PAGE)
    return found


def test_blocks_have_their_places_languages_and_reasons() -> None:
    text = (
        "# A page\n\n```sh\nmake test\n```\n\n<!-- not run: needs a GPU -->\n\n```sh\nmake gpu-check\n"
        "```\n\n```toml\na = 1\n```\n\n```python\nprint(1)\n```\n"
    )
    found = [(each.place, each.language, each.reason) for each in blocks_of(text, PAGE)]
    assert found == [
        ("docs/page.md:3", "sh", None),
        ("docs/page.md:9", "sh", "needs a GPU"),
        ("docs/page.md:17", "python", None),
    ]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("make test\n# only a remark\n\nmake check", ["make test", "make check"]),
        ("curl -s \\\n  http://x", ["curl -s \\\n  http://x"]),
        ("curl -d '\n {}'", ["curl -d '\n {}'"]),
        ("for a in 1 2; do\n  echo $a\ndone", ["for a in 1 2; do\n  echo $a\ndone"]),
        ("cat > f <<'END'\na b\nEND\nls", ["cat > f <<'END'\na b\nEND", "ls"]),
        ("echo a |\n  cat", ["echo a |\n  cat"]),
    ],
)
def test_statements_end_where_a_shell_reads_no_further_line(code: str, expected: list[str]) -> None:
    assert statements(block(code)) == expected


def test_of_a_console_only_what_is_typed_is_a_statement() -> None:
    assert statements(block("$ ls -l\ntotal 0\n$ pwd", "console")) == ["ls -l", "pwd"]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ('make serve ARGS="--port 1"', Kind.SERVER),
        ("LORAX_API_KEY=12345678 make serve", Kind.SERVER),
        (".venv/bin/lorax-launcher --port 3000  # serves", Kind.SERVER),
        ("lorax-launcher --help", Kind.PLAIN),
        ("lorax-cli chat --adapter a", Kind.TALK),
        ("lorax-cli generate hello", Kind.PLAIN),
        ("make test", Kind.PLAIN),
    ],
)
def test_statements_are_told_apart_by_what_they_need(statement: str, expected: Kind) -> None:
    assert kind(statement) is expected


def test_the_program_is_behind_assignments_and_folders() -> None:
    assert program("A=1 B='2 3' .venv/bin/lorax-cli chat") == "lorax-cli"
    assert program("KEY=$(openssl rand -hex 2)") == ""


@pytest.mark.parametrize(
    "code",
    [
        "docker run lorax",
        "nvidia-smi",
        'make serve ARGS="--model-id /path/to/folder"',
        "curl --unix-socket /tmp/lorax-.../admin http://localhost/",
        "lorax-cli adapters check <folder>",
    ],
)
def test_what_cannot_be_run_everywhere_is_a_fault_unless_marked(code: str) -> None:
    assert faults(block(code))
    marked = f"<!-- not run: this needs something -->\n```sh\n{code}\n```\n"
    assert not faults(blocks_of(marked, PAGE)[0])


def test_a_mark_needs_a_reason() -> None:
    assert faults(blocks_of("<!-- not run:  -->\n```sh\nls\n```\n", PAGE)[0])


def test_python_that_is_none_is_a_fault() -> None:
    assert faults(block("for x in", "python"))
    assert not faults(block("print(1)", "python"))


def test_flags_are_this_projects_where_no_other_program_has_them() -> None:
    text = (
        '`--mine`, `make serve ARGS="--also-mine"`, `curl --theirs`; look at --bare.\n\n'
        "| vLLM | here |\n| --- | --- |\n| `--theirs-too` | `--ours` |\n\n"
        "```sh\ncurl --theirs\nlorax-cli --in-a-block\n```\n"
    )
    found = documented_names.flags(text, PAGE)
    assert found == {"--mine", "--also-mine", "--bare", "--ours", "--in-a-block"}


def test_routes_are_found_in_code_and_in_addresses() -> None:
    text = (
        "`POST /v1/x`, `/y`, a/b, `no /z`, `/tmp/z`\n\n```sh\ncurl http://127.0.0.1:3000/w\n```\n"
    )
    assert documented_names.routes(text) == {"/v1/x", "/y", "/w"}


def test_metrics_are_told_from_packages() -> None:
    text = "`lorax_epoch`, `lorax_shards_lost`, `vllm:x`, `lorax_router.service`, `lorax_shard`, `lorax_cli`"
    assert documented_names.metrics(text) == {"lorax_epoch", "lorax_shards_lost", "vllm:x"}


def test_make_targets_are_found_behind_variables_too() -> None:
    text = '`make one`\n\n```sh\nA=1 make two ARGS="x"   # three\nmake\n```\n'
    assert documented_names.make_targets(text, PAGE) == {"one", "two"}


def test_anchors_are_those_of_headings(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# LoRAX's *own*: `a_b`\n\n## Same\n\n## Same\n\n```sh\n# no heading\n```\n")
    assert documented_names.anchors(page) == {"loraxs-own-a_b", "same", "same-1"}


def test_known_flags_are_those_of_all_programs() -> None:
    known = documented_names.known_flags()
    # The launcher's, one that it refuses, the command line's, the benchmark's, the simulator's, a script's.
    assert {"--model-id", "--ngrok", "--adapter", "--rate", "--policy", "--minutes"} <= known
    assert "--shard-timeout-s" not in known
