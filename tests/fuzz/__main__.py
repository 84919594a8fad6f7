"""Run it: ``python -m tests.fuzz --minutes 10 --seed 1``."""

from __future__ import annotations

import argparse
import signal
import sys

from tests.fuzz.playing import KINDS, play
from tests.fuzz.targets import NAMES, target_of
from tests.fuzz.targets.watched import hunt_apart

TRACES = "traces"
# Of all the time, with a part for each: traces have a server to start.
_TRACES_SHARE = 0.5


def fuzz(minutes: float, seed: int) -> str:
    """Play traces for half of the time, and each target for an equal share of the rest.

    Returns all findings; one does not keep the others from being looked for.
    """
    findings = [play(_TRACES_SHARE * minutes, seed)]
    share = (1 - _TRACES_SHARE) * minutes / len(NAMES)
    findings += [_target(name, share, seed) for name in NAMES]
    return "\n".join(each for each in findings if each)


def _target(name: str, minutes: float, seed: int, number: int | None = None) -> str:
    """Play a target's cases, or one of them after those that share what it is given to."""
    numbers = None
    if number is not None:
        together = target_of(name).num_per_opening
        numbers = range(number - number % together, number + 1)
    hunted = hunt_apart(name, seed, 60 * minutes, numbers)
    print(hunted, flush=True)
    return hunted.finding


def main() -> int:
    """Fuzz, print what was found, and return 1 if that is anything but what was planted."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=(TRACES, *NAMES), help="this alone")
    parser.add_argument("--case", type=int, help="of a target: this one again")
    parser.add_argument("--planted", choices=KINDS, default="")
    given = parser.parse_args()
    # Its servers end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if given.planted or given.target == TRACES:
        finding = play(given.minutes, given.seed, given.planted)
    elif given.target:
        finding = _target(given.target, given.minutes, given.seed, given.case)
    else:
        finding = fuzz(given.minutes, given.seed)
    print(finding or "nothing found")
    return (
        int(not finding.startswith(given.planted) or not finding)
        if given.planted
        else int(bool(finding))
    )


if __name__ == "__main__":
    sys.exit(main())
