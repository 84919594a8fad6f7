"""``lorax-simulate``: compare scheduling policies on a workload, over a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from lorax_contract.config import BATCHINGS, SCHEDULING_POLICIES

_HELP = """Compare scheduling policies on a workload.

The server's own scheduler runs over a virtual clock: a cost model says how long each step
takes, so a day of traffic takes a minute. The same options give the same report.

\b
Workloads:
  vtc:SUITE      overload, overload-multi, overload-weighted, proportional, increase,
                 on_off_less, on_off_overload, poisson_short_long, short_long_2, dist_shift,
                 real; options minutes, path (of real), clients
  slora:SETTING  s1 to s6; options n, alpha, rate, cv, duration, prompt, output, clients
  punica:LAW     distinct, identical, uniform, skewed; options requests, ratio, maxlen, rank
  sglang:LAW     uniform, distinct, skewed; options adapters, alpha, rate, requests, ...
  file:PATH      a CSV or JSON file: time, tenant, adapter, prompt_tokens, output_tokens, ...
Options follow after commas, as in slora:s2,n=1000,rate=10,prompt=8-512,clients=adapters.

\b
Example:
  lorax-simulate --workload vtc:overload --policy fcfs --policy fair --plot overload.svg
  lorax-simulate --replay events.log
"""
_PRESETS = ("llama-2-7b-a10g", "llama-3.1-8b-h200", "smollm2-135m-cpu")
_POSITIVE = click.IntRange(min=1)
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _size(name: str, help: str) -> Callable[[Decorated], Decorated]:
    """Return an option that replaces one of the server's sizes."""
    return click.option(f"--{name.replace('_', '-')}", name, type=_POSITIVE, help=help)


@click.command(help=_HELP, context_settings={"max_content_width": 100})
@click.option("--workload", default="vtc:overload", show_default=True, help="Who asks for what.")
@click.option(
    "--policy", "policies", multiple=True, type=click.Choice(SCHEDULING_POLICIES),
    default=("fcfs", "fair", "lorax"), show_default=True, help="A policy; may be given again.",
)  # fmt: skip
@click.option(
    "--server", "preset", type=click.Choice(_PRESETS), default=_PRESETS[0], show_default=True,
    help="What serves: sizes and the price of a step.",
)  # fmt: skip
@click.option("--show-server", is_flag=True, help="Print where the server's figures come from.")
@click.option(
    "--steps", "steps_path", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Fit the price of a step to recorded ones: JSON lines with tokens, kv_read, "
    "adapter_bytes, token_ranks, seconds.",
)  # fmt: skip
@_size("kv_tokens", "Tokens that the KV pool holds.")
@_size("max_rows", "Requests that run at once.")
@_size("max_step_tokens", "Tokens that a step computes.")
@_size("max_adapters", "Slots for adapters.")
@click.option("--batching", type=click.Choice(BATCHINGS),
              help="How prompts and decodes share steps: mixed if not given.")  # fmt: skip
@click.option("--target-itl-ms", type=click.FloatRange(min=0.0, min_open=True),
              help="Milliseconds that a step may take while somebody waits for a token.")  # fmt: skip
@_size("max_kv_read", "Cached tokens that a step's requests attend to together.")
@_size("max_partial_prompts", "Prompts longer than a step that run at once.")
@_size("depth", "Plans that may be unapplied: 1 or 2.")
@_size("load_concurrency", "Adapters that are loaded at once.")
@click.option("--swap-space", type=click.FloatRange(min=0.0), default=0.0, show_default=True,
              help="GiB of host memory for KV of requests that give way.")  # fmt: skip
@click.option("--link", "link_gb_per_s", type=click.FloatRange(min=0.0, min_open=True),
              help="GB/s of the link to host memory, for adapters and KV.")  # fmt: skip
@click.option(
    "--max-new-tokens", type=_POSITIVE,
    help="What requests ask for, where outputs end before; default: exactly their output.",
)  # fmt: skip
@click.option("--seed", type=int, help="Draw another workload; default: the published seed.")
@click.option("--slo", "slo_s", type=float, default=6.0, show_default=True,
              help="Seconds until the first token that count as served well.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
              help="Write all figures there; - is standard output, without the table.")  # fmt: skip
@click.option(
    "--replay", "replay_path", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Make the plans of a server again from what --record-events wrote, instead of a workload; "
    "ends with 1 and says where if one is another.",
)  # fmt: skip
@click.option("--plot", "plot_path", type=click.Path(path_type=Path, dir_okay=False),
              help="Draw service over time and latencies: FILE.svg or FILE.png.")  # fmt: skip
def main(
    *,
    workload: str,
    policies: tuple[str, ...],
    preset: str,
    show_server: bool,
    steps_path: Path | None,
    swap_space: float,
    link_gb_per_s: float | None,
    max_new_tokens: int | None,
    seed: int | None,
    slo_s: float,
    json_path: Path | None,
    plot_path: Path | None,
    replay_path: Path | None,
    **sizes: Any,
) -> None:
    """See the text above."""
    if replay_path is not None:
        _replay(replay_path)
        return
    from rich.console import Console

    from lorax_contract.errors import LoraxError
    from lorax_router.simulator.driver import Simulation, StandstillError
    from lorax_router.simulator.plots import PlotsUnavailableError, save_plots
    from lorax_router.simulator.report import as_json, report
    from lorax_router.simulator.server import PRESETS
    from lorax_router.simulator.table import as_table
    from lorax_router.simulator.workloads.catalog import make_workload

    console = Console(stderr=json_path == Path("-"))
    try:
        given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        if link_gb_per_s is not None:
            given["link_bytes_per_s"] = link_gb_per_s * 1e9
        server = replace(PRESETS[preset], swap_bytes=int(swap_space * 2**30), **given)
        if steps_path is not None:
            server = _fitted(server, steps_path, console)
        trace = make_workload(workload, seed)
        if max_new_tokens is not None:
            trace = trace.asking_for(max_new_tokens)
        if show_server:
            console.print(server.arithmetic, highlight=False)
        runs = [Simulation(trace, server, name).run() for name in dict.fromkeys(policies)]
        values = report(runs, seed=seed, slo_s=slo_s)
        if plot_path is not None:
            save_plots(runs, plot_path)
    except (LoraxError, ValueError, OSError, StandstillError, PlotsUnavailableError) as error:
        raise click.ClickException(str(error)) from None
    if json_path == Path("-"):
        click.echo(as_json(values), nl=False)
        return
    if json_path is not None:
        json_path.write_bytes(as_json(values))
    console.print(as_table(values))


def _fitted(server: Any, path: Path, console: Any) -> Any:
    """Return the server with the prices of recorded steps, and say what they are."""
    from lorax_router.simulator.cost import error_of, fit_cost, read_steps

    steps = read_steps(path)
    cost = fit_cost(steps)
    error = f"median error {error_of(cost, steps):.1%} of {len(steps)} steps"
    console.print(f"{cost}, {error}", soft_wrap=True, highlight=False)
    return replace(server, name=f"{server.name}, steps of {path.name}", cost=cost)


def _replay(path: Path) -> None:
    """Say whether the plans of a log come again; end with 1 if one does not."""
    from lorax_router.event_log.form import EventLogError
    from lorax_router.event_log.replay import replay

    try:
        replayed = replay(path)
    except (EventLogError, OSError) as error:
        raise click.ClickException(str(error)) from None
    if replayed.difference:
        raise click.ClickException(f"the replay differs in {replayed.difference}")
    end = replayed.end or "the log is torn, as that of a process that was killed"
    click.echo(
        f"{replayed.num_events} events, {replayed.num_plans} plans: all as they were ({end})"
    )


if __name__ == "__main__":
    main()
