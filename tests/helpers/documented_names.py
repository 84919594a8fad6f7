"""What pages name: flags, routes, make targets and places to go, as far as they are said to be this project's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
from tests.helpers.documented_blocks import ROOT, blocks_of, program, statements

# Whose words a column of a table holds, where it is not this project.
OTHERS = ("vLLM", "LoRAX", "TGI", "PEFT", "there", "of LoRAX")
# Programs with flags of their own: a text that begins with one is not about this project's.
FOREIGN = (
    "vllm", "curl", "docker", "pip", "grpcurl", "openssl", "lm_eval", "python", "kubectl", "grep",
    "sed", "mkdir", "git", "export", "printf", "echo", "cat", "chmod", "ray",
)  # fmt: skip
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_ROUTE = re.compile(r"(?:(?:GET|POST|DELETE) )?(/[a-z0-9_{}/.-]*)")
# What begins so is a folder of a machine.
_FOLDERS = ("/data", "/dev", "/etc", "/home", "/opt", "/proc", "/srv", "/tmp", "/usr", "/var")
_URL = re.compile(r"https?://(?:127\.0\.0\.1|localhost)(?::\d+)?(/[a-z0-9_/.-]*)")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Packages are called alike.
_METRIC = re.compile(
    r"(?:vllm:|lorax_(?!router|shard\b|launcher|contract|proto|cli\b|bench|telemetry))[a-z_]+$"
)
# What make hands on to pip.
_FOR_PIP = re.compile(r'TORCH="[^"]*"')
_ARGUMENT = re.compile(r"add_argument\(\s*\"(--[a-z-]+)\"")


def prose(text: str) -> str:
    """Return a text without its fenced blocks and comments, and without columns that hold others' words."""
    return "\n".join(_own_cells(_COMMENT.sub("", _FENCE.sub("", text)).splitlines()))


def _own_cells(lines: Iterable[str]) -> Iterator[str]:
    others: set[int] = set()
    is_in_table = False
    for line in lines:
        cells = re.split(r"(?<!\\)\|", line) if line.startswith("|") else []
        if cells and not is_in_table:
            others = {number for number, cell in enumerate(cells) if cell.strip() in OTHERS}
        is_in_table = bool(cells)
        yield (
            "|".join(cell for number, cell in enumerate(cells) if number not in others)
            if cells
            else line
        )


def flags(text: str, page: Path) -> set[str]:
    """Return the flags that a page names as this project's: in its prose and in its commands."""
    spans = [span for span in _SPAN.findall(prose(text)) if not span.startswith(FOREIGN)]
    own = [
        statement
        for block in blocks_of(text, page)
        if block.language != "python"
        for statement in statements(block)
        if _is_own(statement)
    ]
    # In tables of codes and alike flags stand without quotes.
    bare = re.sub(r"`[^`\n]*`", "", prose(text))
    parts = (_FOR_PIP.sub("", part) for part in (*spans, *own, bare))
    return {flag for part in parts for flag in _FLAG.findall(part)}


def _is_own(statement: str) -> bool:
    try:
        return program(statement) not in FOREIGN
    except ValueError:  # quotes of a text that is no command
        return False


def known_flags() -> set[str]:
    """Return all flags of this project's programs."""
    from lorax_bench.cli import main as bench
    from lorax_cli.cli import main as cli
    from lorax_ingress.cli import main as ingress
    from lorax_ingress.simulator.__main__ import main as fleet
    from lorax_launcher.cli import main as launcher
    from lorax_launcher.placing.cli import main as ray
    from lorax_router.cli import main as router
    from lorax_router.simulator.cli import main as simulate
    from lorax_shard.cli import main as shard

    found = {"--help", "--version"}
    for command in (bench, cli, fleet, ingress, launcher, ray, router, simulate, shard):
        found |= _flags_of(command)
    scripts = [*(ROOT / "tests/soak").glob("*.py"), *(ROOT / "tests/fuzz").glob("*.py")]
    scripts += [*(ROOT / "bench").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    scripts += [ROOT / "proto/generate.py"]
    return found | {flag for path in scripts for flag in _ARGUMENT.findall(path.read_text())}


def _flags_of(command: click.Command) -> set[str]:
    found = {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return found.union(*map(_flags_of, below))


def routes(text: str) -> set[str]:
    """Return what looks like a route in a page: in code, by itself, and in the addresses of commands."""
    spans = [_ROUTE.fullmatch(span) for span in _SPAN.findall(prose(text))]
    named = {found[1] for found in spans if found and not found[1].startswith(_FOLDERS)}
    return named | set(_URL.findall(text))


def metrics(text: str) -> set[str]:
    """Return the series that a page names, without labels."""
    return {found[0] for span in _SPAN.findall(text) if (found := _METRIC.match(span))}


def make_targets(text: str, page: Path) -> set[str]:
    """Return the targets of make that a page names."""
    parts = [*_SPAN.findall(text)]
    parts += [each for block in blocks_of(text, page) for each in block.code.splitlines()]
    return {target for part in parts for target in _targets(part)}


def _targets(text: str) -> list[str]:
    found = re.match(r"(?:[A-Z_]+=\S+ )*make ([^#]*)", text)
    try:
        words = shlex.split(found[1]) if found else []
    except ValueError:  # quotes that another line closes
        words = found[1].split()[:1] if found else []
    return [word for word in words[:1] if "=" not in word]


def links(text: str) -> list[str]:
    """Return the targets of a page's links that are in the repository."""
    return [each for each in _LINK.findall(_FENCE.sub("", text)) if "://" not in each]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title.strip())
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = sum(each == name or each.startswith(f"{name}-") for each in found)
        found.add(f"{name}-{number}" if name in found else name)
    return found
