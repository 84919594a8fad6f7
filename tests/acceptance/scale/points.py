"""The points of the list."""

from __future__ import annotations

from tests.acceptance.harness import Point
from tests.acceptance.scale import clustered, doorway, kubernetes, ranks, several, simulated, spread

POINTS = [
    Point(
        "1",
        "three nodes of Ray, 24 and 40 adapters, throughput, a node killed, 1 to 3 to 1 replicas (10 min)",
        clustered.point_ray,
    ),
    Point(
        "1i",
        "two servers of the default model behind lorax-ingress: throughput, one killed under streams (3 min)",
        doorway.point_doorway,
    ),
    Point(
        "1s",
        "two ingresses at one port over Ray: requests, what is managed at either, one killed (3 min)",
        several.point_several,
    ),
    Point(
        "2",
        "one model over two nodes of Ray: answers with adapters, each node's from its own store, the second's read from the first's",
        spread.point_spread,
    ),
    Point(
        "3",
        "Kubernetes: every overlay rendered, valid on three versions, as the code is; images linted",
        kubernetes.point_manifests,
    ),
    Point(
        "4",
        "simulated, 100 replicas, 10,000 adapters: the best p99 first token, loads beside hashing (8 min)",
        simulated.point_routings,
    ),
    Point(
        "5",
        "make gpu-check --ranks 2: parity, speed-up, a killed and a stalled rank; over gloo without GPUs",
        ranks.point_ranks,
    ),
]
