"""``lorax-ingress``: one address for clients, many servers behind it."""

from __future__ import annotations

import logging
import sys

import click

from lorax_contract import logs
from lorax_contract.errors import StartupError
from lorax_contract.process import importing

logger = logging.getLogger(__name__)

_FILE = click.Path(exists=True, dir_okay=False)


@click.command(context_settings={"show_default": True})
@click.option(
    "--replica",
    "replicas",
    multiple=True,
    required=True,
    metavar="NAME=URI",
    help="A server, at its --ingress-uri: NAME=HOST:PORT, NAME=unix:PATH, "
    "dns:HOST:PORT for all addresses of a name, or file:PATH for the NAME=URI on each "
    "line of a file, which may change. Several times for several.",
)
@click.option("--hostname", default="127.0.0.1", help="Address to listen at.")
@click.option("--port", default=3000, type=click.IntRange(0, 65535), help="Port to listen at.")
@click.option(
    "--grpc-port",
    type=click.IntRange(0, 65535),
    help="Port of the gRPC service lorax.v1, its health and reflection (default: not served).",
)
@click.option(
    "--share-port",
    "shares_port",
    is_flag=True,
    help="Let other ingresses of this machine that share it, too, listen at the same ports.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="Port of --hostname that serves this one's /metrics alone (default: not served).",
)
@click.option(
    "--tls-dir",
    type=click.Path(exists=True, file_okay=False),
    help="Folder with ca.pem, cert.pem and key.pem for the links to servers over TCP.",
)
@click.option("--api-keys-file", type=_FILE, help="Keys and tenants; the servers have the same.")
@click.option("--ssl-certfile", type=_FILE, help="Certificate for clients.")
@click.option("--ssl-keyfile", type=_FILE, help="Its key, unless it is in the same file.")
@click.option(
    "--max-connections", default=10_000, type=click.IntRange(1), help="Open connections of clients."
)
@click.option(
    "--client-timeout-s",
    default=60.0,
    type=click.FloatRange(0, min_open=True),
    help="Seconds in which a client has to send a head or a body.",
)
@click.option(
    "--wait-s",
    default=60.0,
    type=click.FloatRange(0),
    help="Seconds that a request waits for a server, where none takes any.",
)
@click.option(
    "--silence-s",
    default=10.0,
    type=click.FloatRange(0, min_open=True),
    help="Seconds after which a server that says nothing is taken for lost.",
)
@click.option("--name", default="ingress", help="What it is called in the servers' logs.")
@click.option("--log-level", default="info",
              type=click.Choice(["debug", "info", "warning", "error"]))  # fmt: skip
def main(log_level: str, **options: object) -> None:
    """Serve clients by many servers: each request goes to where its adapter is."""
    logs.configure(log_level, bound={"process": "ingress"})
    with importing():
        import uvloop

        from lorax_ingress.app import IngressSettings, serve
    try:
        uvloop.run(serve(IngressSettings(**options)))  # type: ignore[arg-type]
    except* StartupError as errors:
        for error in errors.exceptions:
            assert isinstance(error, StartupError)
            logger.error("%s", error)
            sys.exit(int(error.exit_code))


if __name__ == "__main__":
    main()
