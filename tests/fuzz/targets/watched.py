"""Plays a target in a process of its own, within limits, and notices how that ends."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
from multiprocessing.connection import Connection
from typing import Any

from tests.fuzz.targets import target_of
from tests.fuzz.targets.hunt import Hunted, hunt

from lorax_contract import confine

# What a target's process may map beyond what it has when its first case is made.
_MEMORY_BYTES = 6 << 30
# Until then each case must have ended; whoever holds the interpreter is ended, too.
HANG_S = 90.0
_GRACE_S = 60.0


def hunt_apart(
    name: str, seed: int, seconds: float, numbers: range | None = None, hang_s: float = HANG_S
) -> Hunted:
    """Play a target's cases in a process of its own; one that ends is a finding, too."""
    spawn = multiprocessing.get_context("spawn")
    number = spawn.RawValue("q", -1)
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(
        target=_hunt_here, args=(name, seed, seconds, numbers, hang_s, number, there)
    )
    process.start()
    there.close()
    try:
        if here.poll(seconds + hang_s + _GRACE_S):
            hunted: Hunted = here.recv()
            process.join(_GRACE_S)
            return hunted
        how = "does not end"
    except EOFError:
        process.join()
        how = f"ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    replay = f"python -m tests.fuzz --target {name} --seed {seed} --case {number.value}"
    return Hunted(name, finding=f"{name}: the process {how}\n  replay: {replay}")


def _hunt_here(
    name: str,
    seed: int,
    seconds: float,
    numbers: range | None,
    hang_s: float,
    number: Any,
    out: Connection,
) -> None:
    confine.end_with_parent()
    confine.leave_no_core()
    faulthandler.enable()
    # What is logged is for the oracle; a person would read thousands of lines.
    logging.getLogger().addHandler(logging.NullHandler())
    logging.captureWarnings(True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "RUST_BACKTRACE": "0"}
    target = target_of(name)
    confine.limit_memory(_MEMORY_BYTES)

    def tell(now: int) -> None:
        number.value = now

    out.send(hunt(target, seed, seconds=seconds, numbers=numbers, tell=tell, ends_after_s=hang_s))
