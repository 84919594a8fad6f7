"""The commands that README and docs show: read, cut into statements, and told apart by what they need."""

from __future__ import annotations

import enum
import re
import shlex
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELLS = ("sh", "bash", "shell", "console")
LANGUAGES = (*SHELLS, "python")
# What a machine has that can install this project at all, and what the project brings.
PROGRAMS = frozenset(
    "curl python python3 pip make openssl git cat chmod echo printf head tail grep sed mkdir cp mv rm ls sleep "
    "export source cd test sha256sum for if while kill lorax-cli lorax-launcher lorax-bench "
    "lorax-simulate lorax-shard lorax-router grpcurl".split()
)
# Their places are a reader's own: a command with one of them cannot be run as it stands.
PLACEHOLDERS = re.compile(r"/path/to|\.\.\.(?!\w)|<[a-z-]+>|\bYOUR_")
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*?) -->\n\n?)?"
    r"^```(?P<language>[a-z]+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_SUBSTITUTION = re.compile(r"\$\([^()]*\)")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_STAYS = ("lorax-launcher", "lorax-router")
_ENDS = ("--help", "--env", "--download-only", "--version")


class Kind(enum.Enum):
    """What a statement needs to be run."""

    SERVER = "starts a server"
    TALK = "talks"
    PLAIN = "runs"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of commands; ``reason`` says why it is not run, where that is marked."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def place(self) -> str:
        """Where it is."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Return the pages whose commands are run, the README first."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that hold commands, in their order."""
    return blocks_of(page.read_text(), page)


def blocks_of(text: str, page: Path) -> list[Block]:
    """Return the blocks of a text that hold commands."""
    return [
        Block(
            page, text[: each.start("language")].count("\n") + 1, each["language"], each["code"],
            each["reason"],
        )
        for each in _FENCE.finditer(text)
        if each["language"] in LANGUAGES
    ]  # fmt: skip


def statements(block: Block) -> list[str]:
    """Cut a shell's block into statements, each as long as the shell reads on."""
    lines = block.code.splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith(("$ ", "> "))]
    found, begun = [], list[str]()
    for line in lines:
        begun.append(line)
        text = "\n".join(begun)
        if is_whole(text):
            begun.clear()
            if _without_comment(text):
                found.append(text)
    return [*found, *(["\n".join(begun)] if begun else [])]


@cache
def is_whole(text: str) -> bool:
    """Whether a shell would read no further line."""
    if text.endswith("\\"):
        return False
    read = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=20)
    return read.returncode == 0 and "here-document" not in read.stderr


def _without_comment(text: str) -> str:
    return re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE).strip()


def words(statement: str) -> list[str]:
    """Return the words of a statement's first command, without assignments and comments."""
    found = shlex.split(_SUBSTITUTION.sub("x", statement), comments=True)
    while found and _ASSIGNMENT.match(found[0]):
        found = found[1:]
    return found


def program(statement: str) -> str:
    """Return the program that a statement runs; "" for one that assigns only."""
    found = words(statement)
    return Path(found[0]).name if found else ""


def kind(statement: str) -> Kind:
    """Tell what a statement needs to be run."""
    found = words(statement)
    name = program(statement)
    if name == "make" and "serve" in found[1:2]:
        return Kind.SERVER
    if name in _STAYS and not any(each in found for each in _ENDS):
        return Kind.SERVER
    if name == "lorax-cli" and "chat" in found[1:]:
        return Kind.TALK
    return Kind.PLAIN


def faults(block: Block) -> list[str]:
    """Return why a block is neither marked nor can be run; empty: it is one of them."""
    if block.reason is not None:
        return [] if block.reason.strip() else ["it is marked without a reason"]
    if found := PLACEHOLDERS.search(block.code):
        return [f"{found[0]!r} is for the reader to fill in"]
    if block.language == "python":
        return _python_faults(block.code)
    unknown = {program(each) for each in statements(block)} - PROGRAMS - {""}
    return [f"{each} is not on every machine" for each in sorted(unknown)]


def _python_faults(code: str) -> list[str]:
    try:
        compile(code, "<block>", "exec")
    except SyntaxError as error:
        return [f"no Python: {error}"]
    return []
