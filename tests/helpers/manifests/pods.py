"""The server's pod: its command line, probes, variables, rights, volumes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
from tests.helpers.container_lint import inherited, stages
from tests.helpers.manifests.rendering import Manifest

from lorax_launcher.cli import main
from lorax_launcher.options import LauncherOptions, UsageError
from lorax_launcher.refused import check_refused
from lorax_router.http_api.auth import METRICS_PATH, PROBES

ROOT = Path(__file__).parents[3]
# What of them may come from the environment: docs/cli.md, "Tokens for the hub".
TOKENS = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"}
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY", re.IGNORECASE)
# Seconds that the processes have to end in, behind the drain.
_ENDING_S = 20
_GPUS = "nvidia.com/gpu"


class ImageFacts(NamedTuple):
    """What the Dockerfile says of an image."""

    user: str
    # Words before those of the pod.
    entrypoint: list[str]
    # Where it writes, by variable.
    places: dict[str, str]


def image_facts(tag: str) -> ImageFacts:
    """Return what the Dockerfile says of the target that is tagged by its name."""
    instructions = inherited(stages((ROOT / "Dockerfile").read_text()), tag)
    last = dict(instructions)
    text = " ".join(words for name, words in instructions if name == "ENV")
    places = dict(re.findall(r"(\w+)=(/data/\w+)", text))
    return ImageFacts(last["USER"], re.findall(r'"([^"]+)"', last["ENTRYPOINT"])[1:], places)


def server_problems(pods: Manifest, routes: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with the StatefulSet of the server; ``routes`` are the paths it serves."""
    spec = pods["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    name, _, tag = container["image"].partition(":")
    if name != "lorax-py" or tag not in stages((ROOT / "Dockerfile").read_text()):
        yield f"the Dockerfile makes no {container['image']}"
        return
    image = image_facts(tag)
    try:
        values = parsed([*image.entrypoint, *container["args"]])
    except (click.ClickException, UsageError) as error:
        yield error.format_message() if isinstance(error, click.ClickException) else str(error)
        return
    yield from argument_problems(container["args"])
    yield from port_problems(container, values)
    yield from probe_problems(container, routes)
    yield from ending_problems(spec, container, values)
    yield from variable_problems(container)
    yield from right_problems(spec, container, image)
    yield from volume_problems(pods, container, values, image)
    yield from device_problems(spec, container, values)


def parsed(arguments: list[str]) -> dict[str, Any]:
    """Return the launcher's options of a command line; it raises what the launcher would."""
    with main.make_context("lorax-launcher", list(arguments)) as context:
        values = dict(context.params)
    check_refused(values, {})
    return values


def argument_problems(arguments: list[str]) -> Iterator[str]:
    """Yield options that are given twice, of which one would not count."""
    several = {name for o in main.params if getattr(o, "multiple", False) for name in o.opts}
    counts = Counter(each.partition("=")[0] for each in arguments)
    yield from (
        f"{n} is given {num} times" for n, num in counts.items() if num > 1 and n not in several
    )


def port_problems(container: Manifest, values: dict[str, Any]) -> Iterator[str]:
    """Yield ports that the server does not listen on, and those that are not told."""
    listens = {"http": values["port"], "metrics": values["metrics_port"]}
    if values["ingress_uri"]:
        listens["links"] = int(values["ingress_uri"].rpartition(":")[2])
    told = {port["name"]: port["containerPort"] for port in container["ports"]}
    if told != listens:
        yield f"it tells of ports {told} and listens on {listens}"
    if values["hostname"] != "0.0.0.0":
        yield "it listens inside the pod only"


def probe_problems(container: Manifest, routes: Collection[str]) -> Iterator[str]:
    """Yield probes of what is not there, or asks for a key, or gives up too soon."""
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[kind]["httpGet"]
        if asked["path"] not in routes:
            yield f"{kind}: the server has no {asked['path']}"
        elif asked["path"] not in PROBES:
            yield f"{kind}: {asked['path']} asks for a key"
        if asked["port"] not in [port["name"] for port in container["ports"]]:
            yield f"{kind}: there is no port {asked['port']}"
    options = LauncherOptions()
    # A step that hangs is found after a while, and then the shards start.
    for kind, least in (
        ("startupProbe", options.start_timeout_s), ("livenessProbe", options.step_timeout_s * 2),
    ):  # fmt: skip
        probe = container[kind]
        if probe["periodSeconds"] * probe["failureThreshold"] < least:
            yield f"{kind}: it gives up before {least:g} s"


def ending_problems(spec: Manifest, container: Manifest, values: dict[str, Any]) -> Iterator[str]:
    """Yield a pod that is killed while it drains."""
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    if before < 5:
        yield "it stops before proxies know that it leaves"
    if spec["terminationGracePeriodSeconds"] < before + values["grace_period_s"] + _ENDING_S:
        yield f"it is killed before its grace period of {values['grace_period_s']:g} s is over"


def variable_problems(container: Manifest) -> Iterator[str]:
    """Yield variables that nobody reads, and secrets that stand in the file."""
    known = {name for option in main.params for name in _variables(option)} | TOKENS
    for variable in container.get("env", ()):
        if variable["name"] not in known:
            yield f"nobody reads the variable {variable['name']}"
        if _SECRET.search(variable["name"]) and "secretKeyRef" not in variable.get("valueFrom", {}):
            yield f"{variable['name']} stands in the file"
    for word in container["args"]:
        if re.match(r"--(\w+-)*(key|token)=", word):
            yield f"{word.partition('=')[0]} stands in the file"


def _variables(option: click.Parameter) -> list[str]:
    names = option.envvar or []
    return [names] if isinstance(names, str) else list(names)


def right_problems(spec: Manifest, container: Manifest, image: ImageFacts) -> Iterator[str]:
    """Yield rights that the server does not need."""
    pod, own = spec.get("securityContext", {}), container.get("securityContext", {})
    if not pod.get("runAsNonRoot") or str(pod.get("runAsUser")) != image.user:
        yield f"it does not run as the image's user {image.user}"
    if not own.get("readOnlyRootFilesystem"):
        yield "it can write the image's files"
    if own.get("allowPrivilegeEscalation", True) or own.get("capabilities") != {"drop": ["ALL"]}:
        yield "it can get rights"
    if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "it may make any system call"
    if spec.get("automountServiceAccountToken", True):
        yield "it has a token for the cluster"
    if spec.get("enableServiceLinks", True):
        yield "services set its variables"


def volume_problems(
    pods: Manifest, container: Manifest, values: dict[str, Any], image: ImageFacts
) -> Iterator[str]:
    """Yield mounts of nothing, places that cannot be written, and stores of several owners."""
    spec = pods["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    claims = {each["metadata"]["name"] for each in pods["spec"].get("volumeClaimTemplates", ())}
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    for path, mount in mounts.items():
        if mount["name"] not in {*volumes, *claims}:
            yield f"{path}: there is no volume {mount['name']}"
    for path in ("/tmp", *image.places.values()):
        mount = _mount_of(path, mounts)
        if mount is None or mount.get("readOnly"):
            yield f"{path} cannot be written"
        elif not (mount["name"] in claims or "emptyDir" in volumes.get(mount["name"], {})):
            yield f"{path} may be another pod's too"
    for path in values["adapter_local_root"]:
        mount = _mount_of(path, mounts)
        if mount is None or not mount.get("readOnly"):
            yield f"{path} is mounted nowhere, or can be written"
    yield from keys_problems(spec, container, values)


def keys_problems(spec: Manifest, container: Manifest, values: dict[str, Any]) -> Iterator[str]:
    """Yield a file of keys that is not from a secret."""
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    if values["api_keys_file"]:
        mount = _mount_of(values["api_keys_file"], mounts)
        if mount is None or "secret" not in volumes[mount["name"]] or "subPath" in mount:
            yield "the file of keys is no secret, or is not renewed"


def secret_at(spec: Manifest, container: Manifest, path: str | None) -> str | None:
    """Return the name of the secret whose files are at a path."""
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    mount = _mount_of(path or "", {each["mountPath"]: each for each in container["volumeMounts"]})
    found = {} if mount is None else volumes.get(mount["name"], {}).get("secret", {})
    return found.get("secretName")  # type: ignore[no-any-return]


def _mount_of(path: str, mounts: dict[str, Manifest]) -> Manifest | None:
    return next((m for at, m in mounts.items() if path == at or path.startswith(f"{at}/")), None)


def device_problems(spec: Manifest, container: Manifest, values: dict[str, Any]) -> Iterator[str]:
    """Yield ranks without a GPU of their own, or without shared memory."""
    resources = container.get("resources", {})
    if not resources.get("requests", {}).keys() >= {"cpu", "memory", "ephemeral-storage"}:
        yield "it says not what it needs"
    gpus = int(resources.get("limits", {}).get(_GPUS, 0))
    ranks = (values["num_shard"] or 1) if values["device"] == "cuda" else 0
    if gpus != ranks:
        yield f"{ranks} ranks for {gpus} GPUs"
    shared = next((m for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"), None)
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    if ranks > 1 and (
        shared is None or volumes[shared["name"]].get("emptyDir", {}).get("medium") != "Memory"
    ):
        yield "ranks need shared memory"


def metrics_path_problems(path: str) -> Iterator[str]:
    """Yield a scrape of a path that has no metrics."""
    if path != METRICS_PATH:
        yield f"metrics are at {METRICS_PATH}, not at {path}"
