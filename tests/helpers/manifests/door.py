"""The ingress' pod: its command line, probes, rights, and the links to the server's pods."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from tests.helpers.container_lint import stages
from tests.helpers.manifests.pods import (
    image_facts,
    keys_problems,
    parsed,
    right_problems,
    secret_at,
)
from tests.helpers.manifests.rendering import Manifest

from lorax_ingress.cli import main

ROOT = Path(__file__).parents[3]


def door_problems(
    door: Manifest, server: Manifest, services: Mapping[str, Manifest]
) -> Iterator[str]:
    """Yield what is wrong with the Deployment of the ingress; ``services`` are specs by name."""
    spec = door["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    _, _, tag = container["image"].partition(":")
    if tag not in stages((ROOT / "Dockerfile").read_text()):
        yield f"the Dockerfile makes no {container['image']}"
        return
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    program = container["command"][0]
    if scripts.get(program) != f"{main.callback.__module__}:main":  # type: ignore[union-attr]
        yield f"the image has no {program} that is the ingress"
    try:
        values = _parsed(program, container["args"])
    except click.ClickException as error:
        yield error.format_message()
        return
    told = {port["name"]: port["containerPort"] for port in container["ports"]}
    if told != {"http": values["port"], "grpc": values["grpc_port"]}:
        yield f"it tells of ports {told}, and listens elsewhere"
    if values["hostname"] != "0.0.0.0":
        yield "it listens inside the pod only"
    yield from probe_problems(container)
    yield from right_problems(spec, container, image_facts(tag))
    yield from keys_problems(spec, container, values)
    yield from link_problems(door, server, services, values)


def _parsed(program: str, arguments: list[str]) -> dict[str, Any]:
    """Return the options of a command line, whose files are the pod's and not looked for."""
    words = dict(each.split("=", 1) for each in arguments)
    files = {name: words.pop(name) for name in ("--tls-dir", "--api-keys-file") if name in words}
    with main.make_context(program, [f"{name}={value}" for name, value in words.items()]) as made:
        values = dict(made.params)
    return {**values, **{name[2:].replace("-", "_"): value for name, value in files.items()}}


def probe_problems(container: Manifest) -> Iterator[str]:
    """Yield probes that would restart what is well."""
    for kind in ("startupProbe", "readinessProbe"):
        if container[kind]["httpGet"] != {"path": "/health", "port": "http"}:
            yield f"{kind}: it does not ask for the health"
    if "httpGet" in container["livenessProbe"]:
        yield "livenessProbe: it restarts the ingress for want of replicas"


def link_problems(
    door: Manifest, server: Manifest, services: Mapping[str, Manifest], values: dict[str, Any]
) -> Iterator[str]:
    """Yield links that lead nowhere, or are open to anybody."""
    spec, pods = (each["spec"]["template"]["spec"] for each in (door, server))
    (container,), (behind,) = spec["containers"], pods["containers"]
    options = parsed(["--hostname", "0.0.0.0", *behind["args"]])
    (place,) = values["replicas"]
    kind, _, rest = place.partition(":")
    name, _, port = rest.partition(":")
    service = services.get(name)
    if kind != "dns" or service is None or service.get("clusterIP") != "None":
        yield f"{place} is no name that has the address of each pod"
        return
    if not service.get("publishNotReadyAddresses"):
        yield "a replica that drains is left before its streams end"
    if port != str(options["ingress_uri"]).rpartition(":")[2]:
        yield f"the servers let nobody attach at port {port}"
    own = secret_at(spec, container, values["tls_dir"])
    if own is None or own != secret_at(pods, behind, options["ingress_tls_dir"]):
        yield "the two ends of a link have not their certificates from one secret"
