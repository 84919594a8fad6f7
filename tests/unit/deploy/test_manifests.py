"""Kubernetes' manifests speak of options, paths, ports and metrics that there are.

That they follow Kubernetes' schemas is for ``make acceptance NAME=scale``.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml
from tests.helpers.adapter_world import adapter_world
from tests.helpers.in_loop import in_loop
from tests.helpers.manifests.pods import parsed
from tests.helpers.manifests.rendering import Manifest, render
from tests.helpers.manifests.wiring import problems, scaled_by
from tests.unit.deploy.test_dashboards import known

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent for path in FOLDER.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent for path in FOLDER.glob("components/*/kustomization.yaml"))


@pytest.fixture(scope="module")
def routes() -> set[str]:
    """The paths of the server's application."""
    found: set[str] = set()

    @in_loop
    async def look() -> None:
        async with adapter_world() as world:
            found.update((await world.client.get("/openapi.json")).json()["paths"])

    look()
    return found


@pytest.fixture(scope="module")
def scraped() -> dict[str, set[str]]:
    """Names and labels of a live scrape."""
    found: dict[str, set[str]] = {}

    @in_loop
    async def scrape() -> None:
        async with adapter_world() as world:
            await world.post("load", adapter_id="a")
            for sample in await world.metrics():
                name, _, labels = sample.partition("{")
                found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))

    scrape()
    return found


def test_overlays_and_components_are_all_there() -> None:
    names = {path.name for path in OVERLAYS}
    assert names == {"cpu", "gpu", "tensor-parallel", "gateway", "ingress"}
    assert {path.name for path in COMPONENTS} == {
        "keys", "local-store", "shared-adapters", "autoscaling", "monitoring",
    }  # fmt: skip


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_agrees_with_the_code(
    overlay: Path, routes: set[str], scraped: dict[str, set[str]]
) -> None:
    manifests = render(overlay)
    assert list(problems(manifests, routes, known())) == []
    assert list(problems(manifests, routes, scraped)) == []


@pytest.mark.parametrize("overlay", [FOLDER / "overlays/cpu", FOLDER / "overlays/tensor-parallel"])
@pytest.mark.parametrize("component", COMPONENTS, ids=lambda path: path.name)
def test_a_component_fits_every_overlay(overlay: Path, component: Path, routes: set[str]) -> None:
    assert list(problems(render(overlay, component), routes, known())) == []


def test_all_components_fit_together(routes: set[str]) -> None:
    everything = render(FOLDER / "overlays/gpu", *COMPONENTS)
    assert list(problems(everything, routes, known())) == []


def test_the_adapter_of_metrics_makes_what_the_autoscaler_reads() -> None:
    (scaler,) = [m for m in render(FOLDER / "overlays/gateway") if "Autoscaler" in m["kind"]]
    values = yaml.safe_load((FOLDER / "metrics-adapter.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    names = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    assert names is not None
    assert set(names[1].split("|")) == set(scaled_by(scaler))
    assert set(names[1].split("|")) <= known().keys()


def test_ray_is_reached_through_its_ingress_alone() -> None:
    policies = render(FOLDER / "ray")
    assert {each["kind"] for each in policies} == {"NetworkPolicy"}
    rays = {"matchExpressions": [{"key": "ray.io/node-type", "operator": "Exists"}]}
    of_all = policies[0]["spec"]
    assert of_all["podSelector"] == rays
    for policy in policies:
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        for rule in policy["spec"]["ingress"]:
            # Without ports a rule opens all of them, GCS and workers' too: for the cluster itself.
            ports = [port["port"] for port in rule.get("ports", ())]
            is_own = rule["from"] == [{"podSelector": rays}]
            assert is_own or (ports and not {6379, 10001} & set(ports))
            operators = "kuberay-operator" in str(rule["from"])
            assert is_own or operators or 8265 not in ports


def test_replicas_behind_the_gateway_name_no_key_that_the_picker_would_need() -> None:
    manifests = render(FOLDER / "overlays/gateway", FOLDER / "components/keys")
    (server,) = [m for m in manifests if m["kind"] == "StatefulSet"]
    values = parsed(server["spec"]["template"]["spec"]["containers"][0]["args"])
    assert values["api_keys_file"]
    # A port of its own asks for none, unless one is named for it.
    assert values["metrics_port"]
    assert not values["metrics_api_key"]


def _change(manifests: list[Manifest], kind: str, before: str, after: str) -> list[Manifest]:
    """Return the manifests with a text in those of a kind replaced."""
    changed = copy.deepcopy(manifests)
    hits = 0
    for number, each in enumerate(changed):
        text = yaml.safe_dump(each, width=1000)
        if each["kind"] == kind and before in text:
            hits += 1
            changed[number] = yaml.safe_load(text.replace(before, after))
    assert hits, f"no {kind} has {before}"
    return changed


@pytest.mark.parametrize(
    ("kind", "before", "after", "words"),
    [
        ("StatefulSet", "--json-output", "--json-logs", "--json-logs"),
        ("StatefulSet", "--metrics-port=9000", "--metrics-port=9001", "listens on"),
        ("StatefulSet", "--port=3000", "--port=8080", "listens on"),
        ("StatefulSet", "--device=cuda", "--device=cpu", "0 ranks for 4 GPUs"),
        ("StatefulSet", "--num-shard=4", "--num-shard=2", "2 ranks for 4 GPUs"),
        ("StatefulSet", "--num-shard=4", "--port=3000", "--port is given 2 times"),
        ("StatefulSet", "--grace-period=90", "--grace-period=120", "killed before its grace"),
        ("StatefulSet", "--json-output", "--api-key=sk-12345678", "--api-key stands in the file"),
        ("StatefulSet", "medium: Memory", "sizeLimit: 1Gi", "ranks need shared memory"),
        ("StatefulSet", "path: /startup", "path: /ready", "the server has no /ready"),
        ("StatefulSet", "path: /startup", "path: /info", "/info asks for a key"),
        ("StatefulSet", "failureThreshold: 190", "failureThreshold: 30", "it gives up before 1800"),
        ("StatefulSet", "failureThreshold: 80", "failureThreshold: 3", "it gives up before 1200"),
        ("StatefulSet", "name: HF_TOKEN", "name: HUB_TOKEN", "nobody reads the variable HUB_TOKEN"),
        ("StatefulSet", "runAsUser: 10001", "runAsUser: 0", "does not run as the image's user"),
        ("StatefulSet", "readOnlyRootFilesystem: true", "privileged: false", "can write the image"),
        ("StatefulSet", "- ALL", "- NET_RAW", "it can get rights"),
        ("StatefulSet", "mountPath: /data", "mountPath: /store", "/data/lorax cannot be written"),
        ("StatefulSet", "mountPath: /tmp", "mountPath: /run", "/tmp cannot be written"),
        ("StatefulSet", "emptyDir:\n          sizeLimit: 240Gi", "hostPath:\n          path: /srv", "another pod's too"),
        ("StatefulSet", "image: lorax-py:cuda", "image: lorax-py:gpu", "makes no lorax-py:gpu"),
        ("StatefulSet", "serviceName: lorax-pods", "serviceName: pods", "there is no Service pods"),
        ("Service", "targetPort: http", "targetPort: web", "its pods have no port web"),
        ("Service", "name: lorax\n", "name: loras\n", "selects no pods"),
        ("PodDisruptionBudget", "name: lorax", "name: server", "selects no pods"),
        ("NetworkPolicy", "port: metrics", "port: scrape", "its pods have no port scrape"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(
    kind: str, before: str, after: str, words: str, routes: set[str]
) -> None:
    manifests = _change(render(FOLDER / "overlays/tensor-parallel"), kind, before, after)
    found = list(problems(manifests, routes, known()))
    assert any(words in each for each in found), found


@pytest.mark.parametrize(
    ("kind", "before", "after", "words"),
    [
        ("InferencePool", "number: 3000", "number: 8000", "another port than the pods'"),
        ("InferencePool", "number: 9002", "number: 9003", "no picker at lorax-picker:9003"),
        ("HTTPRoute", "/v1/messages", "/v2/messages", "the server has no /v2/messages"),
        ("HTTPRoute", "kind: InferencePool\n      name: lorax", "kind: InferencePool\n      name: pool", "no backend pool"),
        ("HTTPRoute", "parentRefs:\n  - name: lorax", "parentRefs:\n  - name: door", "no gateway door"),
        ("HorizontalPodAutoscaler", "lorax_queue_length", "lorax_queue", "no metric lorax_queue"),
        ("HorizontalPodAutoscaler", "kind: StatefulSet", "kind: Deployment", "no Deployment lorax"),
        ("ConfigMap", "port: 9000", "port: 3000", "reads metrics from port 3000"),
        ("ConfigMap", "vllm:kv_cache_usage_perc", "vllm:kv_usage", "no metric vllm:kv_usage"),
        ("ConfigMap", 'loraSpec: "vllm:lora_requests_info"', 'loraSpec: "vllm:lora_adapter_loaded"', "has not the labels"),
        ("ConfigMap", "- type: queue-scorer", "- type: queues", "there is no plugin queue-scorer"),
    ],
)  # fmt: skip
def test_a_fault_behind_the_gateway_is_found(
    kind: str, before: str, after: str, words: str, routes: set[str]
) -> None:
    manifests = render(FOLDER / "overlays/gateway")
    if kind == "ConfigMap":
        (config,) = [m for m in manifests if m["kind"] == kind]
        assert before in config["data"]["picker.yaml"]
        config["data"]["picker.yaml"] = config["data"]["picker.yaml"].replace(before, after)
    else:
        manifests = _change(manifests, kind, before, after)
    found = list(problems(manifests, routes, known()))
    assert any(words in each for each in found), found


def test_the_ingress_asks_for_the_keys_of_the_servers() -> None:
    manifests = render(FOLDER / "overlays/ingress", FOLDER / "components/keys")
    pods = [m for m in manifests if m["kind"] in ("StatefulSet", "Deployment")]
    assert len(pods) == 2
    for each in pods:
        (container,) = each["spec"]["template"]["spec"]["containers"]
        assert "--api-keys-file=/etc/lorax/keys/keys.toml" in container["args"]
    assert list(problems(manifests, {"/health", "/startup"}, known())) == []


@pytest.mark.parametrize(
    ("kind", "before", "after", "words"),
    [
        ("Deployment", "--grpc-port=3002", "--grpc-door=3002", "No such option"),
        ("Deployment", "--port=3000", "--port=8080", "listens elsewhere"),
        ("Deployment", "--hostname=0.0.0.0", "--hostname=127.0.0.1", "inside the pod only"),
        ("Deployment", "dns:lorax-links:3100", "dns:lorax:3100", "no name that has the address"),
        ("Deployment", "dns:lorax-links:3100", "dns:lorax-links:3000", "nobody attach at port 3000"),
        ("Deployment", "secretName: lorax-links", "secretName: others", "from one secret"),
        ("Deployment", "- lorax-ingress", "- lorax-door", "no lorax-door that is the ingress"),
        ("Deployment", "image: lorax-py:cpu", "image: lorax-py:door", "makes no lorax-py:door"),
        ("Deployment", "tcpSocket:\n            port: http", "httpGet:\n            path: /health", "for want of replicas"),
        ("Deployment", "readOnlyRootFilesystem: true", "privileged: false", "can write the image"),
        ("StatefulSet", "--ingress-uri=0.0.0.0:3100", "--ingress-uri=0.0.0.0:3200", "listens on"),
        ("StatefulSet", "--ingress-tls-dir=/etc/lorax/links", "--ingress-tls-dir=/etc/tls", "from one secret"),
        ("Service", "publishNotReadyAddresses: true", "publishNotReadyAddresses: false", "is left before its streams end"),
        ("Service", "targetPort: grpc", "targetPort: web", "its pods have no port web"),
        ("PodDisruptionBudget", "name: lorax-ingress", "name: door", "selects no pods"),
        ("NetworkPolicy", "port: links", "port: link", "its pods have no port link"),
    ],
)  # fmt: skip
def test_a_fault_of_the_ingress_is_found(
    kind: str, before: str, after: str, words: str, routes: set[str]
) -> None:
    manifests = _change(render(FOLDER / "overlays/ingress"), kind, before, after)
    found = list(problems(manifests, routes, known()))
    assert any(words in each for each in found), found
