"""``lorax-cli adapters``: what a server knows of adapters, managing them, checking a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorax_cli.client import CliError, Server

_DONE = {
    "load": "is loaded", "pin": "stays on the shards", "unpin": "may leave the shards",
    "reload": "was asked for anew", "unload": "is unloaded",
}  # fmt: skip
_STATES = {"failed": "red", "refused": "red", "resident": "green"}
# `lorax-shard check` says that an adapter is refused.
_REFUSED = 1


@click.group()
def adapters() -> None:
    """List and manage the adapters of a server; check a folder before it is deployed."""


@adapters.command("list")
@click.option("--source", help="Only those of this source: hub, local or s3.")
@click.option("--state", help="Only those in this state.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object a line, with all that is known."
)
@click.pass_obj
def list_adapters(server: Server, source: str | None, state: str | None, as_json: bool) -> None:
    """What the server knows: states, sizes, and why one is not served."""
    asked = {"adapter_source": source, "state": state}
    found = server.adapters(**{name: value for name, value in asked.items() if value})
    if as_json:
        for each in found:
            click.echo(json.dumps(each))
        return
    rows = list(found)
    if not rows:
        click.echo("no adapter is known yet: one is as soon as somebody asks for it")
        return
    Console(highlight=False).print(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("adapter", "source", "state", "rank", "pinned", "why", box=None, pad_edge=False)
    for row in rows:
        state = str(row.get("state"))
        table.add_row(
            Text(str(row.get("adapter_id"))), str(row.get("adapter_source")),
            Text(state, style=_STATES.get(state, "")), str(row.get("rank") or ""),
            "yes" if row.get("pinned") else "", Text(_why(row)),
        )  # fmt: skip
    return table


def _why(row: dict[str, Any]) -> str:
    error = row.get("error")
    said = error.get("message") if isinstance(error, dict) else error
    return "; ".join(map(str, filter(None, [said, *(row.get("warnings") or ())])))


def _managing(verb: str, summary: str) -> click.Command:
    @click.argument("adapter_id")
    @click.option("--source", help="hub, local or s3; without it the server's own default.")
    @click.option(
        "--token", envvar="LORAX_ADAPTER_TOKEN",
        help="Opens a private one; it is sent to the server (LORAX_ADAPTER_TOKEN).",
    )  # fmt: skip
    @click.pass_obj
    def manage(server: Server, adapter_id: str, source: str | None, token: str | None) -> None:
        body = {"adapter_id": adapter_id, "adapter_source": source, "api_token": token}
        server.manage(verb, {name: value for name, value in body.items() if value})
        click.echo(f"{adapter_id} {_DONE[verb]}")

    return click.command(verb, help=summary)(manage)


for _verb, _summary in {
    "load": "Have it on the shards before anybody asks.",
    "pin": "Keep it on the shards.",
    "unpin": "Let it leave when others need its place.",
    "reload": "Ask its source whether it has changed.",
    "unload": "Free it everywhere once its requests are done.",
}.items():
    adapters.add_command(_managing(_verb, _summary))


@adapters.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model-id", help="Folder, .gguf file or hub id; without it the embedded default.")
@click.option("--max-adapter-rank", type=int, default=512, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def check(folder: Path, model_id: str | None, max_adapter_rank: int, as_json: bool) -> None:
    """Say whether a server of a model would serve the adapter in FOLDER, and what it makes of its options.

    No server is asked, and no weights of the model are read. The exit code is 1 for an adapter that is
    refused.
    """
    report = _checked(folder, model_id, max_adapter_rank)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report, Console(highlight=False))
    sys.exit(int(report["refusal"] is not None))


def _checked(folder: Path, model_id: str | None, max_rank: int) -> dict[str, Any]:
    """Ask the shard's own program, which reads adapters as a server does."""
    program = str(Path(sys.executable).with_name("lorax-shard"))
    words = [program, "check", str(folder), "--max-adapter-rank", str(max_rank)]
    if model_id is not None:
        words += ["--model-id", model_id]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode not in (0, _REFUSED) or not done.stdout.startswith("{"):
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise CliError(f"the model cannot be described: {last}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _show(report: dict[str, Any], console: Console) -> None:
    refusal, facts = report["refusal"], report["facts"]
    if refusal is not None:
        console.print(Text.assemble(("refused: ", "bold red"), refusal))
    else:
        console.print(Text.assemble(("served", "bold green"), f" with {report['model']}"))
        traits = f", {', '.join(facts['traits'])}" if facts["traits"] else ""
        console.print(
            f"rank {facts['max_rank']} on {facts['num_modules']} modules, "
            f"{facts['nbytes'] / 2**20:.1f} MiB{traits}"
        )
    for warning in report["warnings"]:
        console.print(Text.assemble(("warning: ", "yellow"), warning))
    if report["options"]:
        table = Table("option", "value", "here", "notes", box=None, pad_edge=False)
        for each in report["options"]:
            table.add_row(
                each["name"], Text(_short(each["value"])), each["treatment"], each["note"]
            )
        console.print(table)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
