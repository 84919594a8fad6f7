"""What refers to the server's pods: services, budgets, policies, autoscaler, gateway, picker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import yaml
from tests.helpers.manifests.door import door_problems
from tests.helpers.manifests.pods import metrics_path_problems, server_problems
from tests.helpers.manifests.rendering import Manifest

# Label sets of metrics, by name.
KnownMetrics = Mapping[str, Collection[str]]
_SPECS = ("queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec", "loraSpec", "cacheInfoSpec")
# What the picker's scorer of adapters reads.
LORA_LABELS = {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}


class ManifestSet:
    """The manifests of one rendered folder, by kind."""

    def __init__(self, manifests: Iterable[Manifest]) -> None:
        self.all = list(manifests)

    def of(self, kind: str) -> list[Manifest]:
        """Return those of a kind."""
        return [each for each in self.all if each["kind"] == kind]

    def find(self, kind: str, name: str) -> Manifest | None:
        """Return the one of this name."""
        return next((m for m in self.of(kind) if m["metadata"]["name"] == name), None)

    def pods(self) -> list[Manifest]:
        """Return what makes pods."""
        return [*self.of("StatefulSet"), *self.of("Deployment")]

    def selected(self, labels: Mapping[str, str]) -> list[Manifest]:
        """Return what makes pods with these labels."""
        return [p for p in self.pods() if labels.items() <= _labels(p).items()]


def _labels(pods: Manifest) -> dict[str, str]:
    found: dict[str, str] = pods["spec"]["template"]["metadata"]["labels"]
    return found


def _ports(pods: Manifest) -> dict[str, int]:
    containers = pods["spec"]["template"]["spec"]["containers"]
    return {port["name"]: port["containerPort"] for c in containers for port in c["ports"]}


def problems(
    manifests: Iterable[Manifest], routes: Collection[str], metrics: KnownMetrics
) -> Iterator[str]:
    """Yield what is wrong with a rendered folder.

    ``routes`` are the paths that the server serves, ``metrics`` the labels of its metrics by name.
    """
    found = ManifestSet(manifests)
    server = found.find("StatefulSet", "lorax")
    if server is None:
        yield "there is no StatefulSet lorax"
        return
    yield from server_problems(server, routes)
    checks: dict[str, Callable[[ManifestSet, Manifest], Iterator[str]]] = {
        "Service": service_problems,
        "PodDisruptionBudget": selector_problems,
        "NetworkPolicy": policy_problems,
        "PodMonitor": monitor_problems,
        "InferencePool": pool_problems,
    }
    for kind, check in checks.items():
        for each in found.of(kind):
            yield from (f"{kind} {each['metadata']['name']}: {w}" for w in check(found, each))
    for each in found.of("StatefulSet"):
        if found.find("Service", each["spec"]["serviceName"]) is None:
            yield f"there is no Service {each['spec']['serviceName']}"
    if (door := found.find("Deployment", "lorax-ingress")) is not None:
        services = {each["metadata"]["name"]: each["spec"] for each in found.of("Service")}
        yield from (f"lorax-ingress: {w}" for w in door_problems(door, server, services))
    for each in found.of("HTTPRoute"):
        yield from route_problems(found, each, routes)
    for each in found.of("HorizontalPodAutoscaler"):
        yield from scaling_problems(found, each, metrics)
    for each in found.of("ConfigMap"):
        if "picker.yaml" in each["data"]:
            yield from picker_problems(server, yaml.safe_load(each["data"]["picker.yaml"]), metrics)


def service_problems(found: ManifestSet, service: Manifest) -> Iterator[str]:
    """Yield a service of no pods, or of ports that they do not have."""
    pods = found.selected(service["spec"]["selector"])
    if not pods:
        yield "it selects no pods"
    for each in pods:
        for port in service["spec"]["ports"]:
            if port["targetPort"] not in _ports(each):
                yield f"its pods have no port {port['targetPort']}"


def selector_problems(found: ManifestSet, manifest: Manifest) -> Iterator[str]:
    """Yield what selects no pods."""
    if not found.selected(manifest["spec"]["selector"]["matchLabels"]):
        yield "it selects no pods"


def policy_problems(found: ManifestSet, policy: Manifest) -> Iterator[str]:
    """Yield a policy of no pods, or of named ports that they do not have."""
    pods = found.selected(policy["spec"]["podSelector"]["matchLabels"])
    if not pods:
        yield "it selects no pods"
    for rule in policy["spec"].get("ingress", ()):
        if not rule.get("from"):
            yield "anybody may come in"
        for port in rule.get("ports", ()):
            if isinstance(port["port"], str) and any(port["port"] not in _ports(p) for p in pods):
                yield f"its pods have no port {port['port']}"


def monitor_problems(found: ManifestSet, monitor: Manifest) -> Iterator[str]:
    """Yield scrapes of nothing."""
    yield from selector_problems(found, monitor)
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        yield from metrics_path_problems(endpoint["path"])
        for each in found.selected(monitor["spec"]["selector"]["matchLabels"]):
            if endpoint["port"] not in _ports(each):
                yield f"its pods have no port {endpoint['port']}"


def pool_problems(found: ManifestSet, pool: Manifest) -> Iterator[str]:
    """Yield a pool of other ports than the pods', or without its picker."""
    yield from selector_problems(found, pool)
    for each in found.selected(pool["spec"]["selector"]["matchLabels"]):
        if [port["number"] for port in pool["spec"]["targetPorts"]] != [_ports(each)["http"]]:
            yield "it sends requests to another port than the pods'"
    picker = pool["spec"]["endpointPickerRef"]
    service = found.find("Service", picker["name"])
    ports = [] if service is None else [port["port"] for port in service["spec"]["ports"]]
    if picker["port"]["number"] not in ports:
        yield f"there is no picker at {picker['name']}:{picker['port']['number']}"


def route_problems(found: ManifestSet, route: Manifest, routes: Collection[str]) -> Iterator[str]:
    """Yield paths that the server does not have, and backends that are not there."""
    for rule in route["spec"]["rules"]:
        for match in rule["matches"]:
            if match["path"]["value"] not in routes:
                yield f"the server has no {match['path']['value']}"
        for backend in rule["backendRefs"]:
            if found.find(backend.get("kind", "Service"), backend["name"]) is None:
                yield f"there is no backend {backend['name']}"
    for parent in route["spec"]["parentRefs"]:
        if found.find("Gateway", parent["name"]) is None:
            yield f"there is no gateway {parent['name']}"


def scaling_problems(found: ManifestSet, scaler: Manifest, metrics: KnownMetrics) -> Iterator[str]:
    """Yield an autoscaler of nothing, or by metrics that there are not."""
    target = scaler["spec"]["scaleTargetRef"]
    scaled = found.find(target["kind"], target["name"])
    if scaled is None:
        yield f"there is no {target['kind']} {target['name']} to scale"
    elif "replicas" in scaled["spec"]:
        yield f"{target['name']} has a number of replicas beside its autoscaler"
    for name in scaled_by(scaler):
        if name not in metrics:
            yield f"there is no metric {name}"


def scaled_by(scaler: Manifest) -> list[str]:
    """Return the metrics that an autoscaler reads."""
    return [each["pods"]["metric"]["name"] for each in scaler["spec"]["metrics"]]


def picker_problems(
    server: Manifest, config: dict[str, Any], metrics: KnownMetrics
) -> Iterator[str]:
    """Yield what a picker would read in vain, and plugins that nobody has declared."""
    plugins = {each.get("name", each["type"]): each for each in config["plugins"]}
    source = plugins["metrics-data-source"]["parameters"]
    yield from metrics_path_problems(source["path"])
    if source["port"] != _ports(server)["metrics"]:
        yield f"the picker reads metrics from port {source['port']}"
    parameters = plugins["core-metrics-extractor"]["parameters"]
    engines = {each["name"]: each for each in parameters["engineConfigs"]}
    label = _labels(server)["llm-d.ai/engine-type"]
    if label not in engines or parameters["defaultEngine"] not in engines:
        yield f"the picker knows no engine {label}"
        return
    engine = engines[label]
    for spec in _SPECS:
        if engine[spec] not in metrics:
            yield f"{spec}: there is no metric {engine[spec]}"
    if not set(metrics.get(engine["loraSpec"], ())) >= LORA_LABELS:
        yield f"{engine['loraSpec']} has not the labels {', '.join(sorted(LORA_LABELS))}"
    sizes = {engine["cacheBlockSizeLabelName"], engine["cacheNumBlocksLabelName"]}
    if not set(metrics.get(engine["cacheInfoSpec"], ())) >= sizes:
        yield f"{engine['cacheInfoSpec']} has not the labels {', '.join(sorted(sizes))}"
    for profile in config["schedulingProfiles"]:
        for each in profile["plugins"]:
            if each["pluginRef"] not in plugins:
                yield f"there is no plugin {each['pluginRef']}"
