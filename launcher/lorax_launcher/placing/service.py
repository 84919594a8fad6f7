"""What an operator does with a service: start it, ask it, end it."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lorax_launcher.placing.actors import ControllerActor, GroupActor, IngressActor, RankActor
from lorax_launcher.placing.ray_cluster import (
    RayCluster,
    find_ingresses,
    ingress_name,
    namespace_of,
)
from lorax_launcher.placing.values import IngressSpec, ServiceSpec

_CONTROLLER = "controller"
# Of an ingress that says nothing.
_NOWHERE = {"host": "-", "url": "", "metrics": "", "error": ""}


def start_service(name: str, service: ServiceSpec, ingress: IngressSpec) -> None:
    """Start the controller and the ingresses; ValueError where there are some.

    The first of them, and without certificates all, are on this machine. Where there are others, what
    was on a machine that is lost starts again on another one.
    """
    own = ray.get_runtime_context().get_node_id()
    nodes = [own] if ingress.tls_dir is None else _nodes(own)
    common = {
        "namespace": namespace_of(name), "lifetime": "detached", "num_cpus": 0,
        # What takes nothing at all, Ray puts anywhere; of this, a machine that is full has some, too.
        "memory": 1, "max_restarts": -1, "max_task_retries": 0,
    }  # fmt: skip

    def at(number: int) -> NodeAffinitySchedulingStrategy:
        can_move = ingress.number > 1 and ingress.tls_dir is not None
        return NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=can_move)

    for number in range(ingress.number):
        ray.remote(IngressActor).options(
            name=ingress_name(number + 1), scheduling_strategy=at(number), **common
        ).remote(ingress)
    ray.remote(ControllerActor).options(
        name=_CONTROLLER, scheduling_strategy=at(0), **common
    ).remote(name, service)


def _nodes(first: str) -> list[str]:
    """Return the machines that there are, one of them first."""
    others = (each["NodeID"] for each in ray.nodes() if each["Alive"])
    return [first, *sorted(each for each in others if each != first)]


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


def ask_ingresses(name: str, method: str, timeout_s: float = 5.0) -> list[dict[str, Any]]:
    """Call the ingresses of a service that runs; return what each says, with its name.

    One that says nothing in time has no URL: it starts, or its machine is lost.
    """
    asked = {
        each: getattr(actor, method).remote() for each, actor in find_ingresses(name).items()
    }  # fmt: skip
    if asked:
        ray.wait([*asked.values()], num_returns=len(asked), timeout=timeout_s)
    return [{"name": each, **_NOWHERE, **_answer(answer)} for each, answer in asked.items()]


def _answer(asked: Any) -> dict[str, Any]:
    try:
        return ray.get(asked, timeout=0) or {}
    except (GetTimeoutError, RayActorError):
        return {}


def _ask(name: str, actor: str, method: str, *arguments: Any, timeout_s: float) -> Any:
    called = getattr(ray.get_actor(actor, namespace=namespace_of(name)), method)
    return ray.get(called.remote(*arguments), timeout=timeout_s)


def end_service(name: str) -> None:
    """End the controller and the ingresses, and what is left of groups."""
    for each in RayCluster(name, GroupActor, RankActor).find().values():
        each.remove()
    controller = ray.get_actor(_CONTROLLER, namespace=namespace_of(name))
    for actor in (controller, *find_ingresses(name).values()):
        ray.kill(actor)
