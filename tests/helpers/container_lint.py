"""Whether Dockerfile and compose.yaml agree with the launcher and the checkout.

What is right in itself is for hadolint and for compose's own schema.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import yaml

from lorax_launcher.cli import main
from lorax_launcher.options import LauncherOptions, UsageError
from lorax_launcher.refused import check_refused

TARGETS = ("cpu", "cuda")
PORT = LauncherOptions().port
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Instruction(NamedTuple):
    """One instruction of a Dockerfile."""

    name: str
    text: str


class Stage(NamedTuple):
    """One ``FROM`` and what follows it."""

    image: str
    name: str
    instructions: list[Instruction]


def stages(text: str) -> dict[str, Stage]:
    """Return the stages of a Dockerfile by name, in their order."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found: dict[str, Stage] = {}
    for line in filter(str.strip, joined.splitlines()):
        name, _, rest = line.strip().partition(" ")
        if name.upper() == "FROM":
            image, *alias = re.split(r"\s+AS\s+", rest.strip(), flags=re.IGNORECASE)
            current = Stage(image, alias[0] if alias else str(len(found)), [])
            found[current.name] = current
        else:
            current.instructions.append(Instruction(name.upper(), rest.strip()))
    return found


def inherited(all_stages: dict[str, Stage], name: str) -> list[Instruction]:
    """Return the instructions of a stage, those of the stages it is built from first."""
    stage = all_stages[name]
    before = inherited(all_stages, stage.image) if stage.image in all_stages else []
    return [*before, *stage.instructions]


def dockerfile_problems(text: str, ignored: str, root: Path) -> Iterator[str]:
    """Yield what is wrong with a Dockerfile."""
    found = stages(text)
    for stage in found.values():
        for instruction in stage.instructions:
            yield from instruction_problems(instruction, ignored, root)
    for target in TARGETS:
        if target not in found:
            yield f"there is no target {target}"
        else:
            yield from target_problems(target, inherited(found, target))


def instruction_problems(instruction: Instruction, ignored: str, root: Path) -> Iterator[str]:
    """Yield what is wrong with one instruction."""
    name, text = instruction
    if name in ("ENV", "ARG"):
        for word in shlex.split(text):
            if _SECRET.search(word.partition("=")[0]):
                yield f"{name} {word.partition('=')[0]} would be kept in the image"
    if name == "COPY":
        yield from copy_problems(text, ignored, root)


def copy_problems(text: str, ignored: str, root: Path) -> Iterator[str]:
    """Yield what is wrong with a COPY."""
    if "--from=" in text:
        return
    for source in [word for word in shlex.split(text) if not word.startswith("--")][:-1]:
        if not (root / source).exists():
            yield f"COPY {source}, which does not exist"
        elif is_ignored(source, ignored):
            yield f"COPY {source}, which .dockerignore leaves out"


def is_ignored(path: str, ignored: str) -> bool:
    """Return whether the patterns leave a path of the top folder out; the last match counts."""
    result = False
    for line in ignored.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            is_exception = pattern.startswith("!")
            if fnmatch.fnmatch(path, pattern.lstrip("!").strip("/")):
                result = not is_exception
    return result


def target_problems(target: str, instructions: list[Instruction]) -> Iterator[str]:
    """Yield what is wrong with what an image is in the end."""
    last = dict(instructions)
    if last.get("USER", "root") in ("root", "0"):
        yield f"{target} runs as root"
    if last.get("EXPOSE") != str(PORT):
        yield f"{target} exposes {last.get('EXPOSE')}, the launcher's port is {PORT}"
    if f":{PORT}/health" not in last.get("HEALTHCHECK", ""):
        yield f"{target} asks no /health on port {PORT}"
    volumes = json.loads(last.get("VOLUME", "[]"))
    variables = dict(
        word.partition("=")[::2]
        for name, text in instructions
        if name == "ENV"
        for word in shlex.split(text)
    )
    for name in ("LORAX_CACHE", "HF_HOME"):
        place = variables.get(name, "")
        if not any(place.startswith(f"{volume}/") for volume in volumes):
            yield f"{target} keeps {name} in no volume"
    program, *always = json.loads(last.get("ENTRYPOINT", '[""]'))
    if program != "lorax-launcher":
        yield f"{target} does not start the launcher"
    # CMD is what a chart or a compose file replaces.
    if ("--hostname", "0.0.0.0") not in itertools.pairwise(always):
        yield f"{target} listens inside the container only"
    arguments = [*always, *json.loads(last.get("CMD", "[]"))]
    yield from (f"{target}: {words}" for words in command_problems(arguments))
    roots = [after for flag, after in itertools.pairwise(arguments) if flag.endswith("-root")]
    yield from (f"{target}: {each} is no volume" for each in roots if each not in volumes)


def command_problems(arguments: list[str]) -> Iterator[str]:
    """Yield what the launcher would say of a command line."""
    try:
        with main.make_context("lorax-launcher", list(arguments)) as context:
            values = dict(context.params)
        check_refused(values, {})
    except (click.ClickException, UsageError) as error:
        yield error.format_message() if isinstance(error, click.ClickException) else str(error)
        return
    if values["port"] != PORT:
        yield f"it listens on {values['port']}, the image exposes {PORT}"


def substitute(text: str) -> str:
    """Put the defaults of variables in, as compose does when the caller sets none."""
    return _VARIABLE.sub(lambda match: match[2] or "", text)


def compose_problems(text: str, targets: set[str], root: Path) -> Iterator[str]:
    """Yield what is wrong with a compose file."""
    document: dict[str, Any] = yaml.safe_load(text)
    services: dict[str, dict[str, Any]] = document["services"]
    ports: Counter[tuple[str, str]] = Counter()
    devices: Counter[str] = Counter()
    caches: Counter[str] = Counter()
    for name, service in services.items():
        yield from (f"{name}: {words}" for words in service_problems(service, targets))
        for port in service.get("ports", ()):
            # Services of different profiles do not run together.
            host, _, inside = port.rpartition(":")
            ports.update((profile, host) for profile in service["profiles"])
            if inside != str(PORT):
                yield f"{name}: port {inside} is not the image's"
        devices.update(devices_of(service))
        for volume in service.get("volumes", ()):
            source = substitute(volume).partition(":")[0]
            if not source.startswith((".", "/")):
                caches[source] += 1
                if source not in document["volumes"]:
                    yield f"{name}: there is no volume {source}"
            elif "${" not in volume and not (root / source).exists():
                yield f"{name}: {source} does not exist"
    yield from (f"port {port} is given twice" for (_, port), n in ports.items() if n > 1)
    yield from (f"GPU {device} is given twice" for device, n in devices.items() if n > 1)
    yield from (f"{cache} has two owners" for cache, n in caches.items() if n > 1)


def devices_of(service: dict[str, Any]) -> list[str]:
    """Return the GPUs that a service reserves."""
    resources = service.get("deploy", {}).get("resources", {})
    reserved = resources.get("reservations", {}).get("devices", [])
    return [each for device in reserved for each in device["device_ids"]]


def service_problems(service: dict[str, Any], targets: set[str]) -> Iterator[str]:
    """Yield what is wrong with one service."""
    if service["build"]["target"] not in targets:
        yield f"the Dockerfile has no target {service['build']['target']}"
    arguments = [substitute(word) for word in service["command"]]
    yield from command_problems(arguments)
    given = dict(itertools.pairwise(arguments))
    devices = devices_of(service)
    is_gpu = service["build"]["target"] == "cuda"
    if is_gpu and len(devices) != int(given.get("--num-shard", "1")):
        yield f"{given.get('--num-shard', '1')} ranks for {len(devices)} GPUs"
    if is_gpu and len(devices) > 1 and "shm_size" not in service:
        yield "ranks need shared memory"
    grace = float(given.get("--grace-period", LauncherOptions().grace_period_s))
    if float(str(service.get("stop_grace_period", "10s")).rstrip("s")) <= grace:
        yield f"it is killed before its grace period of {grace:g} s is over"
    for name, value in (service.get("environment") or {}).items():
        if _SECRET.search(name) and not re.fullmatch(r"\$\{\w+(:-)?\}", str(value)):
            yield f"{name} stands in the file"
