"""``lorax-ray``: a service of many servers on a Ray cluster."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from lorax_launcher.placing.output import own_output
from lorax_launcher.placing.values import GroupSpec, IngressSpec, ServiceSpec

_OUTPUT = f"{__name__}.output"
_PAUSE_S, _CONNECT_S = 0.5, 5.0
_STORE = "~/.cache/lorax-py/ray"
_OPTIONS = {"ignore_unknown_options": True, "show_default": True}


@click.group(context_settings={"show_default": True})
@click.option("--address", default="auto", envvar="RAY_ADDRESS", help="The Ray cluster.")
@click.option("--name", default="default", help="The service, where a cluster has several.")
@click.pass_context
def main(context: click.Context, address: str, name: str) -> None:
    """Serve a model by many servers on a Ray cluster, behind one address.

    A cluster is started by Ray's own commands (`ray start`). This one talks to it.
    """
    context.obj = name
    # Before Ray is there, which tells on stdout of nodes that died.
    context.meta[_OUTPUT] = own_output()
    try:
        from lorax_launcher.placing import ray_cluster
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}; install it: pip install 'lorax-py[ray]'") from error
    try:
        check_answers(address)
        ray_cluster.connect(address, name)
    except (OSError, RuntimeError) as error:
        text = f"no Ray cluster answers at {address}: {error}; start one with `ray start --head`"
        raise click.ClickException(text) from error


def check_answers(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try again for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


@main.command(context_settings=_OPTIONS)
@click.option("--replicas", default=1, type=click.IntRange(1), help="Servers.")
@click.option(
    "--max-replicas", type=click.IntRange(1),
    help="Up to so many, by what waits and the KV memory that is taken. [default: --replicas]",
)  # fmt: skip
@click.option("--ingresses", "num_ingresses", default=1, type=click.IntRange(1),
              help="Ingresses at the same port: with --tls-dir on as many machines as there are.")  # fmt: skip
@click.option("--hostname", default="127.0.0.1", help="Address of each one's machine to listen at.")
@click.option("--port", default=3000, type=click.IntRange(0, 65535), help="Port to listen at.")
@click.option("--cpus", default=1.0, type=click.FloatRange(0), help="CPUs that Ray keeps for each.")
@click.option("--gpus", default=0.0, type=click.FloatRange(0), help="GPUs that Ray keeps for each.")
@click.option("--resources", default="{}", help="More that Ray keeps for each, as JSON.")
@click.option("--nodes", "num_nodes", default=1, type=click.IntRange(1),
              help="Machines that share a model, with a rank on each (tensor parallelism).")  # fmt: skip
@click.option("--store-dir", default=_STORE, help="Where each machine keeps adapters.")
@click.option("--tls-dir", help="Folder with certificates on each machine, for links between them.")
@click.option("--ingress-option", multiple=True, help="More of lorax-ingress: NAME=VALUE.")
@click.option("--wait-s", default=1800.0, help="Seconds to wait until all serve; 0: none.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def up(
    name: str, /, *, replicas: int, max_replicas: int | None, num_ingresses: int, hostname: str,
    port: int, ingress_option: tuple[str, ...], wait_s: float, tls_dir: str | None, resources: str,
    options: tuple[str, ...], **kept: Any,
) -> None:  # fmt: skip
    """Start a service: as many servers, and ingresses in front of them, one on this machine.

    OPTIONS, after `--`, are those of lorax-launcher.
    """
    from lorax_launcher.placing import ray_cluster, service

    if service.is_there(name):
        raise click.ClickException(f"the service {name} runs already; `lorax-ray down` ends it")
    host = ray_cluster.own_place()[1]
    group = GroupSpec(
        options=options, resources=_resources(resources), tls_dir=tls_dir, ingress_host=host, **kept
    )
    if not group.bundle:
        raise click.ClickException(
            "a server takes nothing of a machine; give --cpus, --gpus or --resources"
        )
    most = max(max_replicas or 0, replicas)
    wanted = ServiceSpec(group=group, num_ingresses=num_ingresses, least=replicas, most=most)
    more = tuple(f"--{each}" for each in ingress_option)
    ingress = IngressSpec(
        hostname=hostname, port=port, number=num_ingresses, tls_dir=tls_dir, options=more
    )
    service.start_service(name, wanted, ingress)
    if wait_s and (wrong := _wait(name, replicas, wait_s)):
        service.end_service(name)
        raise click.ClickException(wrong)
    _say(_words(_status(name)))


@main.command()
@click.argument("replicas", type=click.IntRange(1))
@click.option("--max-replicas", type=click.IntRange(1), help="Up to so many. [default: REPLICAS]")
@click.option("--wait-s", default=1800.0, show_default=True,
              help="Seconds to wait until as many serve, and no more.")  # fmt: skip
@click.pass_obj
def scale(name: str, replicas: int, max_replicas: int | None, wait_s: float) -> None:
    """Keep REPLICAS servers: new ones are started, those that are too many drained."""
    _ask(name, "scale", replicas, max(max_replicas or 0, replicas))
    if wait_s and (wrong := _wait(name, replicas, wait_s)):
        raise click.ClickException(wrong)
    _say(_words(_status(name)))


@main.command(context_settings=_OPTIONS)
@click.option("--wait-s", default=3600.0, help="Seconds to wait until all are replaced.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def upgrade(name: str, wait_s: float, options: tuple[str, ...]) -> None:
    """Replace all servers one after the other by such with these OPTIONS of lorax-launcher.

    Each starts with the code that is installed on its machine then.
    """
    _ask(name, "upgrade", options)
    if wait_s and (wrong := _wait(name, 1, wait_s)):
        raise click.ClickException(wrong)
    _say(_words(_status(name)))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@click.pass_obj
def status(name: str, *, as_json: bool) -> None:
    """Say which servers there are, where, and how much they have to do."""
    known = _status(name)
    _say(json.dumps(known) if as_json else _words(known))


@main.command()
@click.option("--wait-s", default=120.0, show_default=True, help="Seconds to wait for streams.")
@click.pass_obj
def down(name: str, wait_s: float) -> None:
    """End a service: its servers finish what they have, then all of it ends."""
    from lorax_launcher.placing import service

    _ask(name, "close")
    until = time.monotonic() + wait_s
    while _ask(name, "status")["groups"] and time.monotonic() < until:
        time.sleep(_PAUSE_S)
    service.ask_ingresses(name, "close", timeout_s=max(until - time.monotonic(), 1.0))
    service.end_service(name)


def _say(text: str) -> None:
    click.echo(text, file=click.get_current_context().meta[_OUTPUT])


def _ask(name: str, method: str, *arguments: Any) -> Any:
    from lorax_launcher.placing import service

    if not service.is_there(name):
        raise click.ClickException(
            f"no service {name} runs in this cluster; `lorax-ray up` starts one"
        )
    return service.ask_controller(name, method, *arguments)


def _status(name: str) -> dict[str, Any]:
    from lorax_launcher.placing import service

    known: dict[str, Any] = _ask(name, "status")
    ingresses = service.ask_ingresses(name, "status")
    urls = (each["url"] for each in ingresses if each["url"])
    faults = (each["error"] for each in ingresses if each["error"])
    about = {"url": next(urls, ""), "error": known["error"] or next(faults, "")}
    return {**known, "ingresses": ingresses, **about}


def _wait(name: str, least: int, wait_s: float) -> str:
    """Wait until all is as wanted; return what went wrong, or nothing."""
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        known = _status(name)
        if is_settled(known, least):
            return ""
        if known["error"] and not any(each["state"] == "ready" for each in known["groups"]):
            return str(known["error"])
        time.sleep(_PAUSE_S)
    return f"after {wait_s:g} s not all is as wanted:\n{_words(_status(name))}"


def is_settled(known: Mapping[str, Any], least: int) -> bool:
    """Whether all ingresses and all groups serve that are wanted, these of one generation."""
    groups: Sequence[Mapping[str, Any]] = known["groups"]
    are_new = all(
        each["state"] == "ready" and each["generation"] == known["generation"] for each in groups
    )
    has_doors = all(each["url"] for each in known["ingresses"])
    return bool(known["url"]) and has_doors and are_new and len(groups) == known["wanted"] >= least


def _words(known: Mapping[str, Any]) -> str:
    head = f"{known['url'] or 'not ready'}: {known['wanted']} wanted"
    lines = [head + (f", at most {known['most']}" if known["most"] > known["least"] else "")]
    if len(known["ingresses"]) > 1:
        for each in known["ingresses"]:
            state = "ready" if each["url"] else "not ready"
            lines.append(f"  {each['name']:<10} {state:<9} {each['host']}  {each['metrics']}")
    for each in known["groups"]:
        load = f"{each.get('running', 0)} running, {each.get('queued', 0)} queued"
        where = f"{each.get('host', '-')} node {str(each.get('node', '-'))[:8]}"
        lines.append(f"  {each['name']:<10} {each['state']:<9} {where}  {load}")
    return "\n".join([*lines, *([f"last fault: {known['error']}"] if known["error"] else [])])


def _resources(text: str) -> dict[str, float]:
    try:
        found = json.loads(text)
        return {str(name): float(amount) for name, amount in found.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise click.ClickException(
            f'--resources is no JSON object of numbers, such as {{"lorax": 1}}: {text}'
        ) from error


if __name__ == "__main__":
    sys.exit(main())
