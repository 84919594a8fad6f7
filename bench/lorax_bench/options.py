"""What the commands of ``lorax-bench`` have in common: options, and what they become."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lorax_bench import apis
from lorax_bench.adapters import DTYPES, RANKS
from lorax_bench.popularity import LAWS
from lorax_bench.workloads import LoadOptions

if TYPE_CHECKING:
    from lorax_bench.systems import SystemOptions

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
_NONE = click.IntRange(min=0)
_POSITIVE = click.IntRange(min=1)
_AT_LEAST_0 = click.FloatRange(min=0.0)
_FILE = click.Path(path_type=Path, dir_okay=False)


def numbers(kind: type[int | float]) -> Callable[..., tuple[int | float, ...] | None]:
    """Return what reads numbers separated by commas, for an option's callback."""

    def read(*given: Any) -> tuple[int | float, ...] | None:
        value: str | None = given[-1]
        if value is None:
            return None
        try:
            found = tuple(kind(each) for each in value.split(","))
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list such as 1,2,4") from None
        if min(found) <= 0:
            raise click.BadParameter(f"{value!r} has a number that is not above 0")
        return found

    return read


_SYSTEM = [
    click.option("--url", help="The server to ask; without it one of ours is started."),
    click.option("--api", type=click.Choice(apis.NAMES), default="openai", show_default=True,
                 help="/v1/completions with token ids, or LoRAX's /generate_stream."),
    click.option("--name", help="What the system is called in the results."),
    click.option("--model", help="The base model's name; default: the first that it lists."),
    click.option("--adapter", "adapter_names", multiple=True,
                 help="An adapter of the server, by its name; once for each."),
    click.option("--adapter-source", help="Where LoRAX finds adapters: hub, local, s3."),
    click.option("--tokenizer", type=_FILE, help="The model's tokenizer.json, for --api lorax."),
    click.option("--extensions/--no-extensions", default=True, show_default=True,
                 help="Send what vLLM and this server know beyond OpenAI, such as ignore_eos."),
    click.option("--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True),
                 default=600.0, show_default=True, help="Seconds that a request may take."),
    click.option("--ranks", callback=numbers(int), default=",".join(map(str, RANKS)),
                 show_default=True, help="Ranks of the adapters that are made, in turns."),
    click.option("--adapter-dtype", type=click.Choice(DTYPES), default="float32",
                 show_default=True, help="What they are stored in."),
]  # fmt: skip
_LOAD = [
    click.option("--adapters", type=_NONE, help="How many adapters; 0: the base model alone."),
    click.option("--law", type=click.Choice(LAWS), help="Which adapter each request asks for."),
    click.option("--alpha", type=click.FloatRange(min=0, min_open=True),
                 help="Exponent of zipf and power."),
    click.option("--cv", type=_AT_LEAST_0, help="Of an open loop's intervals; 1: Poisson."),
    click.option("--temperature", type=_AT_LEAST_0, help="0: the likeliest token."),
    click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True)),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--last-id", type=click.IntRange(min=101), help="Highest token id of a prompt."),
]  # fmt: skip
_OUTPUT = [
    click.option("--rounds", type=_POSITIVE, default=3, show_default=True),
    click.option("--warm-rounds", type=_NONE, default=0, show_default=True,
                 help="Rounds before those, which are thrown away."),
    click.option("--json", "json_path", type=_FILE, help="Write the results to this file."),
    click.option("--png", "png_path", type=_FILE, help="Write plots."),
    click.option("--html", "html_path", type=_FILE, help="Write a page with tables and plots."),
    click.option("--by-adapter", is_flag=True, help="Print a table of each adapter."),
    click.argument("launcher_options", nargs=-1, type=click.UNPROCESSED),
]  # fmt: skip


def common_options(command: Decorated) -> Decorated:
    """Give a command the options about system, load and output."""
    for option in reversed([*_SYSTEM, *_LOAD, *_OUTPUT]):
        command = option(command)
    return command


def system_options(values: Mapping[str, Any]) -> SystemOptions:
    """Return how the system is found and asked."""
    from lorax_bench.systems import SystemOptions

    names = (
        "url", "api", "name", "model", "adapter_source", "tokenizer", "extensions", "timeout_s",
        "last_id", "ranks", "adapter_dtype", "launcher_options",
    )  # fmt: skip
    return SystemOptions(
        adapters=values["adapter_names"], api_key=os.environ.get("OPENAI_API_KEY"),
        **{name: values[name] for name in names},
    )  # fmt: skip


def load_options(values: Mapping[str, Any], **more: Any) -> LoadOptions:
    """Return what is asked of the workload."""
    names = ("adapters", "law", "alpha", "cv", "temperature", "top_p")
    return LoadOptions(**{**{name: values[name] for name in names}, **more})
