"""The points of the list."""

from __future__ import annotations

from tests.acceptance import connections
from tests.acceptance.faults import (
    attackers,
    kills,
    overload,
    poison,
    restarts,
    soaking,
    standing,
    weaknesses,
)
from tests.acceptance.harness import Point

POINTS = [
    Point("1", "kill -9 of a shard under 100 streams, 20 rounds (10 min)", kills.point_kills),
    Point("1l", "the same with longer outputs, 4 rounds (5 min)", kills.point_long_kills),
    Point("1h", "SIGSTOP of a shard under 100 streams, 3 rounds", kills.point_hangs),
    Point("1c", "standing cost of outlasting losses, of a step", standing.point_standing),
    Point("1p", "kill -9 of one of two ranks, 5 rounds", kills.point_ranks),
    Point(
        "2", "kill -9 of the router: served again within 2x its own start", restarts.point_router
    ),
    Point(
        "2l", "kill -9 of the launcher: no orphans, the next start works", restarts.point_launcher
    ),
    Point("3", "32 rows, of which one makes its pass fail", poison.point_failing_pass),
    Point("3k", "32 rows, of which one kills the process", poison.point_deadly),
    Point("3n", "32 rows, of which one has no numbers", poison.point_no_numbers),
    Point(
        "4r", "two servers restarted in turn under 24 streams: none is lost", restarts.point_rolling
    ),
    Point("4s", "make soak, 10 minutes: nothing lost, wrong or left behind", soaking.point_soak),
    Point("4f", "make fuzz, 10 minutes: nothing found", soaking.point_fuzz),
    Point("4p", "five planted faults, each found within 10 minutes", soaking.point_planted),
    Point("5", "W1 to W36 of LoRAX: tests show that none is here", weaknesses.point_weaknesses),
    Point(
        "6",
        "5x overload for two minutes: goodput, refusals, memory, recovery",
        overload.point_overload,
    ),
    Point(
        "6i",
        "10,000 idle and 200 half-open connections beside chats",
        connections.idle(10_000, "--max-connections", "12000"),
    ),
    Point(
        "6j",
        "the same where 4,096 may be open",
        connections.idle(10_000),
    ),
    Point("7", "the attack suite: every test that docs/security.md names", attackers.point_suite),
    Point("7l", "others' p95 beside a minute of attacks (3 min)", attackers.point_beside),
]
