"""``lorax-cli``: talk to a server from a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from lorax_cli.adapters import adapters
from lorax_cli.chat import Chat, answer
from lorax_cli.client import CliError, Server


class _OneLineErrors(click.Group):
    """Says what went wrong in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CliError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_OneLineErrors)
@click.option(
    "--url", envvar="LORAX_URL", default="http://127.0.0.1:3000", show_default=True,
    help="Where the server is (LORAX_URL).",
)  # fmt: skip
@click.option(
    "--api-key", envvar="LORAX_API_KEY", help="A key, if it asks for one (LORAX_API_KEY)."
)
@click.option(
    "--admin", envvar="LORAX_ADMIN",
    help="Where adapters are managed: a unix socket or a URL (LORAX_ADMIN).",
)  # fmt: skip
@click.pass_context
def main(ctx: click.Context, url: str, api_key: str | None, admin: str | None) -> None:
    """Talk to a server and its adapters."""
    if "://" not in url:
        url = f"http://{url}"
    ctx.obj = Server(url, api_key, admin)
    ctx.call_on_close(ctx.obj.close)


def _sampling(command: Any) -> Any:
    for option in (
        click.option(
            "--adapter", help="The adapter, like NAME or local:NAME; without it the base."
        ),
        click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True),
        click.option("--temperature", type=click.FloatRange(0.0), help="0: always the likeliest."),
        click.option("--top-p", type=click.FloatRange(0.0, 1.0)),
        click.option("--seed", type=click.IntRange(0), help="Draws that come again."),
    ):
        command = option(command)
    return command


def _settings(max_tokens: int, **chosen: Any) -> dict[str, Any]:
    return {"max_tokens": max_tokens} | {k: v for k, v in chosen.items() if v is not None}


@main.command()
@_sampling
@click.option("--system", default="", help="What the model is told before all else.")
@click.pass_obj
def chat(
    server: Server, /, adapter: str | None, max_tokens: int, system: str, **chosen: Any
) -> None:
    """Converse; /adapter NAME goes on with another adapter in the middle."""
    with contextlib.suppress(ImportError):
        # Lines can be edited, and earlier ones come back.
        import readline  # noqa: F401
    console = Console(highlight=False, soft_wrap=True)
    settings = _settings(max_tokens, **chosen)
    Chat(server, console, input, settings, adapter=adapter, system=system).run()


@main.command()
@click.argument("prompt")
@_sampling
@click.option(
    "--schema", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file with the JSON schema that the answer follows.",
)  # fmt: skip
@click.option(
    "--chat", "as_chat", is_flag=True, help="The prompt is a message, not a text to go on."
)
@click.option("--stats", is_flag=True, help="Say what it took, behind the answer.")
@click.pass_obj
def generate(
    server: Server,
    /,
    prompt: str,
    adapter: str | None,
    max_tokens: int,
    schema: Path | None,
    as_chat: bool,
    stats: bool,
    **chosen: Any,
) -> None:
    """Go on with PROMPT (-: with what standard input holds), as it comes."""
    text = sys.stdin.read() if prompt == "-" else prompt
    body = _settings(max_tokens, **chosen) | {"model": adapter or server.models()[0]["id"]}
    if schema is not None:
        form = {"name": schema.stem, "schema": _json_of(schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    body |= {"messages": [{"role": "user", "content": text}]} if as_chat else {"prompt": text}
    path = "/v1/chat/completions" if as_chat else "/v1/completions"
    reply = answer(server, path, body, lambda piece: click.echo(piece, nl=False))
    click.echo()
    if stats:
        click.echo(str(reply), err=True)
    sys.exit(0 if reply.is_whole else 130)


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CliError(f"{path} is not JSON: {error}") from error


main.add_command(adapters)

if __name__ == "__main__":
    main()
