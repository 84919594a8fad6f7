"""What an operator does with a service: start it, ask it, end it."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lorax_launcher.placing.actors import ControllerActor, GroupActor, IngressActor, RankActor
from lorax_launcher.placing.ray_cluster import INGRESS, RayCluster, namespace_of
from lorax_launcher.placing.values import IngressSpec, ServiceSpec

_CONTROLLER = "controller"


def start_service(name: str, service: ServiceSpec, ingress: IngressSpec) -> None:
    """Start the controller and the ingress on this machine; ValueError where there are some."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    common = {
        "namespace": namespace_of(name), "lifetime": "detached", "num_cpus": 0,
        "max_restarts": -1, "max_task_retries": 0, "scheduling_strategy": here,
    }  # fmt: skip
    ray.remote(IngressActor).options(name=INGRESS, **common).remote(ingress)
    ray.remote(ControllerActor).options(name=_CONTROLLER, **common).remote(name, service)


def is_there(name: str) -> bool:
    """Whether a service runs."""
    try:
        ray.get_actor(_CONTROLLER, namespace=namespace_of(name))
    except ValueError:
        return False
    return True


def ask_controller(name: str, method: str, *arguments: Any, timeout_s: float = 30.0) -> Any:
    """Call the controller of a service that runs."""
    return _ask(name, _CONTROLLER, method, *arguments, timeout_s=timeout_s)


def ask_ingress(name: str, method: str, timeout_s: float = 30.0) -> Any:
    """Call the ingress of a service that runs."""
    return _ask(name, INGRESS, method, timeout_s=timeout_s)


def _ask(name: str, actor: str, method: str, *arguments: Any, timeout_s: float) -> Any:
    called = getattr(ray.get_actor(actor, namespace=namespace_of(name)), method)
    return ray.get(called.remote(*arguments), timeout=timeout_s)


def end_service(name: str) -> None:
    """End the controller and the ingress, and what is left of groups."""
    for each in RayCluster(name, GroupActor, RankActor).find().values():
        each.remove()
    for actor in (_CONTROLLER, INGRESS):
        ray.kill(ray.get_actor(actor, namespace=namespace_of(name)))
