"""Plays traces against a running server."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.acceptance.faults.server import faulty_server
from tests.fuzz.oracles import Oracles
from tests.fuzz.traces import MUTATORS, make_trace
from tests.helpers.server import Server

PLANTED = Path(__file__).with_name("planted")
KINDS = ("crash", "hang", "slow-down", "corruption", "leak")
# Two servers share the machine's cores.
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# So few blocks that rows give way.
_FEW_BLOCKS = ("--num-blocks", "160", "--max-batch-prefill-tokens", "256", "--restarts", "0")


def _server(planted: str) -> Server:
    environment = {"PYTHONPATH": str(PLANTED), "PLANTED_KIND": planted} if planted else {}
    return faulty_server(*_FEW_BLOCKS, env=os.environ | _ONE_THREAD | environment)


def _other() -> Server:
    return faulty_server("--prefix-caching", "off", env=os.environ | _ONE_THREAD)


def play(minutes: float, seed: int, planted: str = "") -> str:
    """Play traces until one is found fault with, or the time is over; return the finding."""
    draw, counts = random.Random(seed), Counter[str]()
    with _server(planted) as server, _other() as other:
        oracles = Oracles(server, other)
        begun, num = time.perf_counter(), 0
        while time.perf_counter() - begun < 60 * minutes:
            trace = make_trace(draw)
            num += 1
            counts.update(trace.mutators)
            if finding := oracles.judge(trace, draw):
                shots = json.dumps([asdict(shot) for shot in trace.shots])
                print(f"trace {num} of seed {seed}, by {trace.mutators}: {shots}")
                return finding
        print(f"{num} traces in {time.perf_counter() - begun:.0f} s")
        print("by mutator:", ", ".join(f"{name} {counts[name]}" for name in MUTATORS))
    return ""
