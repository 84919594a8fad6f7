"""``python -m lorax_ingress.simulator``: compare routings of a fleet, over a virtual clock."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from lorax_ingress.routing.values import RoutingSettings
from lorax_ingress.simulator.comparison import (
    FleetFigures,
    FleetSetting,
    as_rows,
    compare,
    moved_shares,
)
from lorax_ingress.simulator.routings import ROUTINGS
from lorax_ingress.simulator.workloads import FLEET_WORKLOADS

_POSITIVE = click.IntRange(min=1)
_ABOVE_ZERO = click.FloatRange(min=0.0, min_open=True)


@click.command(context_settings={"max_content_width": 100})
@click.option("--workload", "workloads", multiple=True, type=click.Choice(FLEET_WORKLOADS),
              default=("drift", "bursts"), show_default=True, help="Who asks for what.")  # fmt: skip
@click.option("--routing", "routings", multiple=True, type=click.Choice(ROUTINGS),
              default=ROUTINGS, show_default=True, help="Who decides where requests go.")  # fmt: skip
@click.option("--seed", "seeds", multiple=True, type=int, default=(1,), show_default=True,
              help="Draw the workload anew; may be given again.")  # fmt: skip
@click.option("--replicas", "num_replicas", type=_POSITIVE, default=100, show_default=True,
              help="How many servers.")  # fmt: skip
@click.option("--adapters", "num_adapters", type=click.IntRange(min=2), default=10_000,
              show_default=True, help="How many adapters.")  # fmt: skip
@click.option("--slots", "num_slots", type=_POSITIVE, default=32, show_default=True,
              help="Adapters on each device.")  # fmt: skip
@click.option("--load", type=_ABOVE_ZERO, default=0.75, show_default=True,
              help="Part of what all could serve with every adapter in place.")  # fmt: skip
@click.option("--duration", "duration_s", type=_ABOVE_ZERO, default=40.0, show_default=True,
              help="Seconds of arrivals.")  # fmt: skip
@click.option("--gossip", "gossip_s", type=_ABOVE_ZERO, default=1.0, show_default=True,
              help="Seconds between two views of a replica, and until one is there.")  # fmt: skip
@click.option("--alpha", type=click.FloatRange(min=0.0), default=1.0, show_default=True,
              help="Skew: adapter r has traffic as 1 / r^alpha.")  # fmt: skip
@click.option("--joining", "num_joining", type=click.IntRange(min=0), default=0, show_default=True,
              help="So many of the replicas join at half time.")  # fmt: skip
@click.option("--preloads/--no-preloads", default=True, show_default=True,
              help="Whether homes load adapters before requests come.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False),
              help="Write the figures there, too.")  # fmt: skip
def main(
    *,
    workloads: tuple[str, ...],
    routings: tuple[str, ...],
    seeds: tuple[int, ...],
    json_path: Path | None,
    num_replicas: int,
    num_adapters: int,
    num_slots: int,
    load: float,
    duration_s: float,
    gossip_s: float,
    alpha: float,
    num_joining: int,
    preloads: bool,
) -> None:
    """Compare how requests are routed to many replicas of the simulated server.

    Each replica is the server's own scheduler and adapter table over one virtual clock; the same
    options give the same figures.
    """
    setting = FleetSetting(
        num_replicas=num_replicas,
        num_adapters=num_adapters,
        num_slots=num_slots,
        load=load,
        duration_s=duration_s,
        gossip_s=gossip_s,
        alpha=alpha,
        num_joining=num_joining,
    )
    if num_joining >= num_replicas:
        raise click.UsageError("--joining must leave a replica that is there from the first")
    settings = RoutingSettings(preloads=preloads)
    figures: list[FleetFigures] = []
    for workload in workloads:
        for seed in seeds:
            for each in compare(setting, workload, routings, seed, settings):
                figures.append(each)
                click.echo(f"{workload}, seed {seed}, {each.routing}: done", err=True)
    for line in as_rows(figures):
        click.echo(line)
    for name, share in moved_shares(num_replicas, num_adapters).items():
        click.echo(f"one more replica moves {share:.2%} of the adapters with {name}")
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(each) for each in figures], indent=2) + "\n")


if __name__ == "__main__":
    main()
