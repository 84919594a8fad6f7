"""``lorax-shard``: serve one rank, prepare a model, or check an adapter. Imports nothing heavy for ``--help``."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.group()
def main() -> None:
    """One rank of a LoRAX shard group, and the preparation of its model."""


@main.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="The configuration, one JSON document (lorax_contract.config.ShardConfig).",
)
def serve(config_path: Path) -> None:
    """Serve one rank until a signal, or until the launcher is gone."""
    from lorax_shard.app import run

    sys.exit(int(run(config_path.read_bytes())))


@main.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def prepare(arguments: tuple[str, ...]) -> None:
    """Make a model a local folder; see ``lorax-shard prepare --help``."""
    from lorax_shard.prepare.cli import prepare_command

    prepare_command.main(args=list(arguments), prog_name="lorax-shard prepare")


@main.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def check(arguments: tuple[str, ...]) -> None:
    """Say whether an adapter's folder would be served; see ``lorax-shard check --help``."""
    from lorax_shard.check import check_command

    check_command.main(args=list(arguments), prog_name="lorax-shard check")


if __name__ == "__main__":
    main()
