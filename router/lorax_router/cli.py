"""``lorax-router``: serve HTTP and gRPC in front of a shard group."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lorax_contract.process import importing
from lorax_contract.start_clock import StartClock


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
    required=True,
    help="The configuration, one JSON document (lorax_contract.config.RouterConfig); "
    "- reads one line from standard input.",
)
def main(config_path: Path) -> None:
    """Serve HTTP and gRPC in front of a shard group until a signal comes."""
    if str(config_path) == "-":
        text = sys.stdin.buffer.readline()
    else:
        text = config_path.read_bytes()
    clock = StartClock()
    with importing():
        from lorax_router.app import run
    clock.ended("imports")

    sys.exit(int(run(text, clock)))


if __name__ == "__main__":
    main()
