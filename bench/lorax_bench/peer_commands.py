"""The commands of ``lorax-bench`` that run other systems too: compare, demo, peers."""

from __future__ import annotations

import contextlib
import datetime as dt
import sys
from collections.abc import Iterator
from pathlib import Path

import click

_FILE = click.Path(path_type=Path, dir_okay=False)
_RESULTS = Path("bench/results")
_ROUNDS = click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
_LAUNCHER = click.argument("launcher_options", nargs=-1, type=click.UNPROCESSED)
_NAMES = ("vllm", "openvino", "llama-cpp")


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Say in one line what a person can do something about."""
    from lorax_bench.peers.environments import PeerMissing
    from lorax_bench.peers.worker_peer import PeerFailed
    from lorax_bench.report.plots import NoPlotsError
    from lorax_bench.serve import StartError

    try:
        yield
    except (PeerMissing, PeerFailed, NoPlotsError, StartError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@click.command()
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    default=("w1",),
    show_default=True,
    help="One of `lorax-bench workloads`; once for each. `long` is long-prompts.",
)
@click.option(
    "--adapters",
    default="0",
    show_default=True,
    help="How many, such as 0,8,32; 0: the base model alone.",
)
@click.option(
    "--peers",
    default="vllm,openvino",
    show_default=True,
    help="Those beside this server: vllm, openvino, llama-cpp, static, continuous, peft, "
    "and ranks, which is this server with two of them.",
)
@_ROUNDS
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--json",
    "json_path",
    type=_FILE,
    help="Where results go; default: a file of today in bench/results.",
)
@click.option("--png", "png_path", type=_FILE, help="Write plots.")
@click.option("--html", "html_path", type=_FILE, help="Write a page with tables and plots.")
@_LAUNCHER
def compare(
    workloads: tuple[str, ...],
    adapters: str,
    peers: str,
    rounds: int,
    seed: int,
    json_path: Path | None,
    png_path: Path | None,
    html_path: Path | None,
    launcher_options: tuple[str, ...],
) -> None:  # fmt: skip
    """Run this server and its peers in turns, and print ratios with their spread.

    `lorax-bench peers install` sets the peers up before; options after -- go to lorax-launcher.
    """
    from rich.console import Console

    from lorax_bench.compare import ComparisonPlan, as_results
    from lorax_bench.compare import compare as run
    from lorax_bench.document import save
    from lorax_bench.peers.environments import Environments
    from lorax_bench.report import page, plots, table
    from lorax_bench.serve import prepare_model

    with _in_words():
        plan = ComparisonPlan(
            workloads=tuple(_workload(spec) for spec in workloads),
            adapters=tuple(int(each) for each in adapters.split(",")),
            peers=tuple(name for name in peers.split(",") if name), rounds=rounds, seed=seed,
        )  # fmt: skip
        environments = Environments.default()
        _, model_dir = prepare_model(launcher_options)
        comparisons = run(
            plan, model_dir, environments=environments, options=launcher_options,
            told=lambda line: click.echo(line, err=True),
        )  # fmt: skip
        found = as_results(plan, comparisons, environments, ["lorax-bench", *sys.argv[1:]])
        path = json_path or _default_path()
        save(found, path)
        table.show(found, Console(width=None if sys.stdout.isatty() else 130))
        if png_path:
            plots.save_png(found, png_path)
        if html_path:
            page.save_page(found, html_path)
        click.echo(f"kept in {path}")


def _workload(spec: str) -> str:
    name, sign, rest = spec.partition(",")
    return ("long-prompts" if name.lower() == "long" else name.lower()) + sign + rest


def _default_path() -> Path:
    folder = _RESULTS if _RESULTS.is_dir() else Path()
    return folder / f"compare-{dt.datetime.now(dt.UTC):%Y%m%d-%H%M}.json"


@click.command()
@_ROUNDS
@_LAUNCHER
def demo(rounds: int, launcher_options: tuple[str, ...]) -> None:
    """Six requests: a static padded batch beside continuous batching, and the speed-up."""
    from rich.console import Console

    from lorax_bench.demo import show, tell

    with _in_words():
        story = tell(rounds, launcher_options)
    show(story, Console(width=None if sys.stdout.isatty() else 130))
    if not story.sameness.ok:
        sys.exit(1)


@click.group()
def peers() -> None:
    """Set up the systems that this server is compared with."""


@peers.command()
@click.argument("names", nargs=-1, type=click.Choice(_NAMES))
def install(names: tuple[str, ...]) -> None:
    """Make what is not there yet of the peers' environments: all, or those named.

    They lie in $LORAX_BENCH_PEERS, or in `bench` of the project's cache.
    """
    from lorax_bench.peers.environments import Environments, install_all
    from lorax_bench.serve import prepare_model

    with _in_words():
        _, model_dir = prepare_model(())
        if not install_all(Environments.default(), names or _NAMES, model_dir):
            sys.exit(1)
