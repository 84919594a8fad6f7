"""``lorax-bench``: measure a server by what its clients see."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorax_bench import peer_commands
from lorax_bench.options import common_options, load_options, numbers, system_options

if TYPE_CHECKING:
    from lorax_bench.document import MeasuredRun, NamedRatio, Results
    from lorax_bench.requests import Workload
    from lorax_bench.session import Variant
    from lorax_bench.systems import AskedSystem

_HELP = """Measure a server of LoRA adapters by what its clients see.

Without --url one of ours is started on a free port, with adapters made for it, and ended
afterwards; options after -- go to lorax-launcher.

\b
Examples:
  lorax-bench run w1 --adapters 8 --retention --html w1.html
  lorax-bench run mixed,requests=80 --rate 4 --cv 2 --url http://127.0.0.1:8000
  lorax-bench sweep fixed,prompt=128 --concurrency 1,2,4,8 --json sweep.json
  lorax-bench run w1 --adapters 32 -- --max-batch-size 64
  lorax-bench compare --workload w1 --adapters 0,8 --peers vllm,openvino
"""
# What of the extra `bench` nothing goes without.
_CLIENT = "aiohttp"


class _Commands(click.Group):
    """The commands, whose packages may be missing."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a missing client is told in a line."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if error.name != _CLIENT:
                raise
            raise click.ClickException(
                f"lorax-bench needs {_CLIENT}: install lorax-py[bench]"
            ) from None


def _in_words(command: Callable[..., None]) -> Callable[..., None]:
    """Say in one line what a person can do something about."""

    @wraps(command)
    def run(*values: Any, **named: Any) -> None:
        from lorax_bench.document import DocumentError
        from lorax_bench.report.plots import NoPlotsError
        from lorax_bench.serve import StartError
        from lorax_bench.session import NoAnswerError
        from lorax_bench.systems import SystemOptionsError

        told = (DocumentError, NoPlotsError, StartError, NoAnswerError, SystemOptionsError)
        try:
            command(*values, **named)
        except (*told, ValueError) as error:
            raise click.ClickException(str(error)) from error

    return run


@click.group(cls=_Commands, help=_HELP, context_settings={"max_content_width": 100})
@click.version_option(package_name="lorax-py")
def main() -> None:
    """Parse and run."""
    # What was started is ended however this program ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@main.command()
@click.argument("spec", metavar="WORKLOAD")
@click.option("--concurrency", type=click.IntRange(min=0), help="Requests at once; 0: no limit.")
@click.option("--rate", type=click.FloatRange(min=0.0), help="Requests per second that are sent.")
@click.option("--retention", is_flag=True, help="Run it without adapters too, in turns.")
@common_options
@_in_words
def run(
    spec: str, concurrency: int | None, rate: float | None, retention: bool, **values: Any
) -> None:
    """Run one workload, several rounds. `lorax-bench workloads` lists them."""
    from lorax_bench.session import Variant, take_turns, warm_up
    from lorax_bench.systems import asked_system
    from lorax_bench.workloads import effective

    options = effective(spec, load_options(values, concurrency=concurrency, rate=rate))
    num_adapters = options.adapters or 0
    if retention and not num_adapters:
        raise ValueError(
            "--retention compares with and without adapters: --adapters must give them"
        )
    with asked_system(system_options(values), num_adapters) as system:

        def variant(name: str, **more: Any) -> Variant:
            chosen = replace(options, **more)
            workload = partial(_built, spec, chosen, values, system)
            return Variant(name=name, workload=workload, rate=options.rate or None)

        variants = [variant("" if not num_adapters else f"{num_adapters} adapters")]
        if retention:
            variants.insert(0, variant("base", adapters=0))
        warm_up(system, num_adapters)
        runs = take_turns(
            system, variants, values["rounds"], warm_rounds=values["warm_rounds"], watch=_watch()
        )
    _show(f"{spec} on {system.name}", runs, values, ratios=_retention(runs) if retention else ())


@main.command()
@click.argument("spec", metavar="WORKLOAD")
@click.option("--concurrency", "chosen", callback=numbers(int), help="Levels, such as 1,2,4,8,16.")
@click.option(
    "--rate", "rates", callback=numbers(float), help="Requests per second, such as 0.5,1,2."
)
@click.option("--rate-steps", type=click.IntRange(min=1),
              help="So many rates, between one request at a time and all at once.")  # fmt: skip
@common_options
@_in_words
def sweep(
    spec: str,
    chosen: tuple[int, ...] | None,
    rates: tuple[float, ...] | None,
    rate_steps: int | None,
    **values: Any,
) -> None:
    """Run a workload at rising loads. Without an option: at concurrency 1, 2, 4, 8 and 16."""
    from lorax_bench import sweeps
    from lorax_bench.session import take_turns, warm_up
    from lorax_bench.systems import asked_system
    from lorax_bench.workloads import effective

    if sum(each is not None for each in (chosen, rates, rate_steps)) > 1:
        raise ValueError("--concurrency, --rate and --rate-steps are three ways: take one")
    options = effective(spec, load_options(values))
    num_adapters = options.adapters or 0
    name = f"{num_adapters} adapters" if num_adapters else ""
    with asked_system(system_options(values), num_adapters) as system:

        def at(number: int, concurrency: int | None, rate: float | None) -> Workload:
            load = replace(options, concurrency=concurrency or 0, rate=rate or 0.0)
            return _built(spec, load, values, system, number)

        warm_up(system, num_adapters)
        runs: list[MeasuredRun] = []
        if rate_steps is not None:
            found, runs = sweeps.find_rates(system, at, rate_steps, _watch())
            rates = tuple(found)
        variants = (
            sweeps.rate_variants(name, at, rates) if rates
            else sweeps.concurrency_variants(name, at, chosen or sweeps.levels(16))
        )  # fmt: skip
        runs += take_turns(
            system, variants, values["rounds"], warm_rounds=values["warm_rounds"], watch=_watch()
        )
    _show(f"{spec} on {system.name}, by load", runs, values)


@main.command()
@click.option("--model-dir", type=click.Path(path_type=Path, exists=True), help="A model's folder.")
@click.option("--rows", callback=numbers(int), default="1,8,32,64", show_default=True)
@click.option("--prompts", callback=numbers(int), default="128,512,2048", show_default=True)
@click.option("--context", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="0: as many as torch takes.")
def step(
    model_dir: Path | None,
    rows: list[int],
    prompts: list[int],
    context: int,
    rounds: int,
    threads: int,
) -> None:
    """Time steps of a shard on this machine, part by part, beside what they cannot beat."""
    from lorax_bench.steps.run import measure_steps
    from lorax_bench.steps.table import markdown

    steps = measure_steps(model_dir, rows, prompts, context=context, rounds=rounds, threads=threads)
    click.echo(markdown(steps))


@main.command()
def workloads() -> None:
    """List the workloads and what each takes."""
    from lorax_bench.workloads import KINDS, default_parameters

    for name, kind in KINDS.items():
        click.echo(f"{click.style(name, bold=True)}: {kind.summary}")
        for option, value in default_parameters(name).items():
            shown = "-".join(map(str, value)) if isinstance(value, tuple) else value
            click.echo(f"    {option}={shown}")


@main.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--png", "png_path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--html", "html_path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--by-adapter", is_flag=True, help="Print a table of each adapter.")
@_in_words
def report(file: Path, **values: Any) -> None:
    """Show results that were kept as JSON, and draw them anew."""
    from lorax_bench.document import load

    _write(load(file), values)


@main.command()
@click.argument("pages", nargs=-1, required=True,
                type=click.Path(path_type=Path, exists=True, dir_okay=False))  # fmt: skip
@_in_words
def renew(pages: tuple[Path, ...]) -> None:
    """Make the tables of results in Markdown pages anew, from the files that they name."""
    from lorax_bench.report import markdown

    for page in pages:
        page.write_text(markdown.renew(page))


def _built(
    spec: str, options: Any, values: Mapping[str, Any], system: AskedSystem, number: int
) -> Workload:
    from lorax_bench.workloads import build

    return build(
        spec, options=options, seed=values["seed"], number=number, last_id=system.last_id
    )  # fmt: skip


def _retention(runs: Sequence[MeasuredRun]) -> list[NamedRatio]:
    from lorax_bench.document import compared

    base = [run for run in runs if not run.num_adapters]
    others = [run for run in runs if run.num_adapters]
    if not all(run.figures.output_tokens_per_s for run in base):
        return []  # nothing came; what failed is told in words
    return [compared("retention (with adapters ÷ without)", others, base)]


def _show(
    title: str, runs: Sequence[MeasuredRun], values: Mapping[str, Any],
    ratios: Sequence[NamedRatio] = (),
) -> None:  # fmt: skip
    """Print and write results; the exit code says whether a request failed."""
    from lorax_bench.document import results, save

    found = results(title, runs, ratios=ratios, command=["lorax-bench", *sys.argv[1:]])
    if values["json_path"]:
        save(found, values["json_path"])
    _write(found, values)
    if any(run.figures.num_failed for run in runs):
        sys.exit(1)


def _write(found: Results, values: Mapping[str, Any]) -> None:
    from rich.console import Console

    from lorax_bench.report import page, plots, table

    # In a file or a pipe there is room.
    width = None if sys.stdout.isatty() else 130
    table.show(found, Console(width=width), by_adapter=values["by_adapter"])
    if values["png_path"]:
        plots.save_png(found, values["png_path"])
    if values["html_path"]:
        page.save_page(found, values["html_path"])


def _watch() -> Any:
    from lorax_bench.progress import watched

    return watched


for each in (peer_commands.compare, peer_commands.demo, peer_commands.peers):
    main.add_command(each)
