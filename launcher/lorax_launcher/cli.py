"""The command `lorax-launcher`."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lorax_contract.exit_codes import ExitCode, hint
from lorax_launcher.console import Console
from lorax_launcher.elsewhere import RANKS_VARIABLE, RanksElsewhere
from lorax_launcher.environment import read_environment
from lorax_launcher.facts import gather_facts
from lorax_launcher.flags import OPTION_GROUPS, GroupedCommand, refused_options
from lorax_launcher.options import LauncherOptions, UsageError
from lorax_launcher.refused import check_refused
from lorax_launcher.resolve import LaunchPlan, resolve
from lorax_launcher.run_dir import run_directory
from lorax_launcher.start_times import StartTimes
from lorax_launcher.supervisor import Programs, Supervisor
from lorax_launcher.versions import describe_environment

_HELP = """Serve a language model over HTTP with LoRAX's interface.

Starts the shard that holds the model and the router in front of it, and watches both. Every
option can be given as the environment variable named beside it. Tokens for the hub are read from
HF_TOKEN, HUGGING_FACE_HUB_TOKEN or HF_API_TOKEN.
"""
_EPILOG = (
    "Options of LoRAX that this version does not serve are refused with a reason: docs/cli.md."
)


def _main(**values: Any) -> None:
    """Parse, refuse what is not served, and run."""
    times = StartTimes()
    if values.pop("show_env"):
        for line in describe_environment(gather_facts()):
            click.echo(line)
        return
    ambient = read_environment(os.environ)
    given = _given(values)
    options = LauncherOptions(**{**ambient.options, **given})
    console = Console(json_output=options.json_output, level=options.log_level)
    try:
        unused = [text for name, text in ambient.warnings.items() if name not in given]
        for warning in (*unused, *check_refused(values, os.environ)):
            console.warning(warning)
        code = launch(options, console, times)
    except UsageError as error:
        console.error(str(error), exit_code=int(ExitCode.USAGE))
        code = ExitCode.USAGE
    finally:
        console.close()
    sys.exit(int(code))


main = click.version_option(package_name="lorax-py")(GroupedCommand(
    name="lorax-launcher",
    params=[*(option for group in OPTION_GROUPS.values() for option in group), *refused_options()],
    callback=_main,
    help=_HELP,
    epilog=_EPILOG,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
))  # fmt: skip


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that click got, by the names of the launcher's."""
    names = {field.name for field in dataclasses.fields(LauncherOptions)}
    given = {name: value for name, value in values.items() if name in names and value is not None}
    if not given.get("json_output"):
        # The variable LOG_FORMAT may still ask for it.
        given.pop("json_output", None)
    return given


def launch(options: LauncherOptions, console: Console, times: StartTimes | None = None) -> int:
    """Run until the end; return the exit code. ``times`` has counted since the start."""
    with run_directory() as run_dir:
        plan = resolve(options, gather_facts(), str(run_dir))
        elsewhere: Mapping[int, tuple[str, ...]] = {}
        if (ranks := os.environ.get(RANKS_VARIABLE)) and not options.download_only:
            placed = RanksElsewhere.read(Path(ranks))
            plan, elsewhere = placed.spread(plan), placed.programs
        programs = Programs(shard=(find_program("lorax-shard"),),
                            router=(find_program("lorax-router"),), elsewhere=elsewhere)  # fmt: skip
        for note in plan.notes:
            console.info(note)
        for warning in plan.warnings:
            console.warning(warning)
        if not options.download_only and (taken := first_taken_port(plan)):
            console.error(f"{taken} {hint(ExitCode.PORT_IN_USE)}",
                          exit_code=int(ExitCode.PORT_IN_USE))  # fmt: skip
            return ExitCode.PORT_IN_USE
        return asyncio.run(
            _supervise(plan, programs, console, run_dir, options.download_only, times)
        )


async def _supervise(
    plan: LaunchPlan, programs: Programs, console: Console, run_dir: Path, download_only: bool,
    times: StartTimes | None,
) -> int:  # fmt: skip
    supervisor = Supervisor(
        plan, programs, console, run_dir, download_only=download_only, times=times
    )
    return await supervisor.run()


def find_program(name: str) -> str:
    """Return the path of a console script, the one installed beside this program first."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise UsageError(f"the program {name} is not installed; install lorax-py again.")
    return found


def first_taken_port(plan: LaunchPlan) -> str | None:
    """Say which port of the router is taken, before the model is loaded for nothing."""
    router = plan.router
    ports = (
        ("--port", router.hostname, router.port),
        ("--grpc-port", router.hostname, router.grpc_port),
        ("--admin-port", "127.0.0.1", router.admin_port),
        ("--metrics-port", router.hostname, router.metrics_port),
    )
    for flag, host, port in ports:
        if port and is_taken(host, port):
            return f"{flag} {port} is in use on {host}."
    return None


def is_taken(host: str, port: int) -> bool:
    """Whether somebody listens on the address; unknown addresses are left to the router."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    family, kind, protocol, _, address = infos[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


if __name__ == "__main__":
    main()
